"""Weights, optimizer state and gradients of a model under each low-rank method, by the literature's formulas.

Sizes of a matrix with sides m and n, rank r, k = max(m, n), l = min(m, n), in numbers. What is no such matrix
(embeddings, output layer, norms, biases) is trained by Adam under every method.

=============  =========================  =======================  ==================
method         weights                    Adam's state             gradients
=============  =========================  =======================  ==================
full           m n                        2 m n                    m n
low-rank       (m + n) r                  2 (m + n) r              (m + n) r
SLTrain        (m + n) r + nnz + indices  2 ((m + n) r + nnz)      (m + n) r + nnz
LoRA, ReLoRA   m n + (m + n) r            2 (m + n) r              (m + n) r
GaLore, Fira   m n                        2 k r + l r (projector)  m n
APOLLO         m n                        2 k r                    m n
APOLLO-Mini    m n                        2 k                      m n
=============  =========================  =======================  ==================
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from lit_reason.errors import UserError

METHODS = ("full", "low-rank", "SLTrain", "LoRA, ReLoRA", "GaLore, Fira", "APOLLO", "APOLLO-Mini")


class MethodBytes(NamedTuple):
    """Bytes under one method.

    Attributes:
        weights: of the model, indices of sparse entries included.
        optimizer: Adam's moments and projectors.
        gradients: all of them at once.
    """

    weights: float
    optimizer: float
    gradients: float


def method_bytes(
    method: str,
    matrices: Iterable[Sequence[int]],
    others: int,
    rank: int,
    *,
    number_bytes: int = 2,
    density: float = 0.03,
    index_bytes: int = 4,
) -> MethodBytes:
    """What a method holds, activations apart.

    Args:
        method: one of `METHODS`.
        matrices: sides of each matrix that the method treats.
        others: number of all other parameters.
        rank: r, at most the shorter side; APOLLO-Mini takes 1.
        number_bytes: of a weight, a gradient, a moment: 2 for bfloat16, as published figures have it.
        density: share of nonzero entries of SLTrain's sparse part.
        index_bytes: of the place of such an entry: 4 here, 8 in the code released with the paper.

    Raises:
        UserError: no such method.
    """
    if method not in METHODS:
        raise UserError(f"method is '{method}'; allowed: {'; '.join(METHODS)}")
    weights = gradients = others
    state = 2 * others
    indices = 0
    for m, n in matrices:
        dense, factors, longer, shorter = m * n, (m + n) * rank, max(m, n), min(m, n)
        nonzeros = math.floor(density * dense)
        own, adam, trained = {
            "full": (dense, 2 * dense, dense),
            "low-rank": (factors, 2 * factors, factors),
            "SLTrain": (factors + nonzeros, 2 * (factors + nonzeros), factors + nonzeros),
            "LoRA, ReLoRA": (dense + factors, 2 * factors, factors),
            "GaLore, Fira": (dense, 2 * longer * rank + shorter * rank, dense),
            "APOLLO": (dense, 2 * longer * rank, dense),
            "APOLLO-Mini": (dense, 2 * longer, dense),
        }[method]
        weights, state, gradients = weights + own, state + adam, gradients + trained
        indices += nonzeros if method == "SLTrain" else 0
    return MethodBytes(weights * number_bytes + indices * index_bytes, state * number_bytes, gradients * number_bytes)
