"""How strongly two sets of vectors depend on each other: the Hilbert-Schmidt independence criterion.

Shapes: N samples, D and E widths of the vectors.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

LEAST_SAMPLES = 4  # the estimator averages over four different samples


class Dependence(NamedTuple):
    """Dependence between two sets of vectors.

    Args:
        hsic: unbiased estimate; 0 on average for independent sets, and then negative as often as not.
        normalised: the same divided by the geometric mean of each set's dependence on itself; in [-1, 1], and 1 for
            sets with equal kernels. Not unbiased. 0 where a set does not vary.
    """

    hsic: float
    normalised: float


def dependence(x_ND: Tensor, y_NE: Tensor) -> Dependence:
    """Bias-corrected HSIC with Gaussian kernels (Song et al., JMLR 13:1393, 2012, eq. 5), in float64.

    With K and L the kernel matrices, their diagonals set to 0, the estimator is

        [tr(K L) + (1'K1)(1'L1) / ((N-1)(N-2)) - 2/(N-2) 1'KL1] / (N (N-3)),

    computed as the inner product of the two U-centred matrices over N (N-3) (Szekely and Rizzo 2014, Annals of
    Statistics 42:2382), which is the same number, and shows that a set's dependence on itself is never negative.

    Args:
        x_ND: one vector a sample, [N, D].
        y_NE: its counterpart, [N, E].

    Returns:
        The estimate and its normalised version.

    Raises:
        ValueError: fewer than four samples, other shapes, or values that are not finite.
    """
    for vectors in (x_ND, y_NE):
        if vectors.ndim != 2 or len(vectors) != len(x_ND) or len(vectors) < LEAST_SAMPLES:
            raise ValueError(
                f"dependence needs two matrices of equally many, at least {LEAST_SAMPLES}, rows; "
                f"got {tuple(x_ND.shape)} and {tuple(y_NE.shape)}"
            )
        if not bool(torch.isfinite(vectors).all()):
            raise ValueError("dependence: a vector holds values that are not finite")
    n = len(x_ND)
    a_NN, b_NN = (_u_centred(gaussian_kernel(v)) for v in (x_ND, y_NE))
    product, own_a, own_b = (
        float((p * q).sum()) / (n * (n - 3)) for p, q in ((a_NN, b_NN), (a_NN, a_NN), (b_NN, b_NN))
    )
    scale = (own_a * own_b) ** 0.5
    # Rounding leaves some 1e-33 where a set does not vary.
    return Dependence(product, product / scale if min(own_a, own_b) > 1e-24 else 0.0)


def gaussian_kernel(x_ND: Tensor) -> Tensor:
    """Kernel matrix exp(-d^2 / 2 s^2), [N, N] float64, with s the median heuristic's bandwidth.

    The bandwidth is the (lower) median of the distances between two samples that differ; the median over all pairs
    would be 0 where most samples are equal.

    Args:
        x_ND: one vector a sample, [N, D].
    """
    x_ND = x_ND.double()
    # Not by way of the matrix product, which loses the digits of small distances.
    distance_NN = torch.cdist(x_ND, x_ND, compute_mode="donot_use_mm_for_euclid_dist")
    n = len(x_ND)
    pairs = distance_NN[tuple(torch.triu_indices(n, n, 1))]
    pairs = pairs[pairs > 0]
    if not len(pairs):
        return torch.ones_like(distance_NN)
    return torch.exp(-distance_NN.square() / (2 * float(pairs.median()) ** 2))


def _u_centred(kernel_NN: Tensor) -> Tensor:
    """The matrix with diagonal 0 and rows that sum to 0 (Szekely and Rizzo 2014, definition 2)."""
    n = len(kernel_NN)
    kernel_NN = kernel_NN.clone().fill_diagonal_(0.0)
    rows_N = kernel_NN.sum(1) / (n - 2)
    total = kernel_NN.sum() / ((n - 1) * (n - 2))
    return (kernel_NN - rows_N[:, None] - rows_N[None, :] + total).fill_diagonal_(0.0)
