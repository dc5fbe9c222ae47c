"""LIME: a weighted ridge regression of the reward on which players are there (arXiv 1602.04938, equation 1).

Shape letters: N samples, P players.
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from lit_reason.rewards.attribution.shapley import Worth


def lime(
    worth: Worth, P: int, samples: int, generator: Generator, *, width: float = 0.25, ridge: float = 1e-3
) -> Tensor:
    """Coefficients of a linear model of the reward around the whole response.

    A sample keeps a number of players drawn evenly from 0 to P - 1; the first one keeps all. Its weight is
    `exp(-(d / width)^2)` with `d` the cosine distance to the whole. Nothing makes the coefficients sum to the reward:
    the intercept, which is not penalised, keeps the rest.

    Args:
        worth: of coalitions.
        P: number of players.
        samples: coalitions to evaluate.
        generator: draws them.
        width: of the locality kernel.
        ridge: weight of the squared coefficients.

    Returns:
        `float64 [P]`.
    """
    if P == 0:
        return torch.zeros(0, dtype=torch.float64)
    size_N = torch.randint(0, P, (samples,), generator=generator)
    rank_NP = torch.rand((samples, P), generator=generator, dtype=torch.float64).argsort(1).argsort(1)
    present_NP = rank_NP < size_N[:, None]
    present_NP[0] = True
    z_NP = present_NP.double()
    distance_N = 1 - (z_NP.sum(1) / P).sqrt()
    return weighted_ridge(z_NP, worth(present_NP), torch.exp(-((distance_N / width) ** 2)), ridge)


def weighted_ridge(z_NP: Tensor, value_N: Tensor, weight_N: Tensor, ridge: float) -> Tensor:
    """Slopes that minimise `sum_n w_n (v_n - b - z_n . beta)^2 + ridge |beta|^2`, the intercept b left free.

    Args:
        z_NP: regressors.
        value_N: targets.
        weight_N: weights of the samples.
        ridge: weight of the penalty.

    Returns:
        beta, `float64 [P]`.
    """
    share_N = weight_N / weight_N.sum()
    z_NP, value_N = z_NP - share_N @ z_NP, value_N - share_N @ value_N  # centring takes the intercept out
    gram = z_NP.T @ (weight_N[:, None] * z_NP) + ridge * torch.eye(z_NP.shape[1], dtype=torch.float64)
    return torch.linalg.solve(gram, z_NP.T @ (weight_N * value_N))
