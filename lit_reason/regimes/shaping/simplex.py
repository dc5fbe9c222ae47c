"""Points on the simplex of shaping weights.

Shape letters: N points, K weights that are not negative and sum to 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.quasirandom import SobolEngine

VERTICES = ("final", "uniform")


def sobol_points(count: int, K: int, seed: int) -> Tensor:
    """Points spread evenly: the gaps between sorted Sobol coordinates, which are uniform on the simplex.

    Args:
        count: number of points.
        K: number of weights, at least 2.
        seed: scrambles the sequence.

    Returns:
        `float64 [count, K]`.
    """
    if count < 1:
        return torch.zeros((0, K), dtype=torch.float64)
    inner = SobolEngine(K - 1, scramble=True, seed=seed).draw(count).double().sort(1).values
    edge = torch.zeros((count, 1), dtype=torch.float64)
    return torch.cat([edge, inner, edge + 1], 1).diff(dim=1)


def initial_points(explainers: Sequence[str], count: int, seed: int) -> Tensor:
    """Where the search begins: the vertices of explainers that cost nothing, then Sobol points.

    Args:
        explainers: names, in the order of the weights.
        count: number of points.
        seed: of the Sobol points.
    """
    corners = [i for i, name in enumerate(explainers) if name in VERTICES][:count]
    vertices = torch.eye(len(explainers), dtype=torch.float64)[corners]
    return torch.cat([vertices, sobol_points(count - len(corners), len(explainers), seed)])


def on_simplex(weights: Tensor) -> Tensor:
    """Weights that an optimizer has let slip past an edge, clamped and brought to sum 1.

    Args:
        weights: `[K]`.
    """
    weights = weights.double().clamp(0, 1)
    return weights / weights.sum()
