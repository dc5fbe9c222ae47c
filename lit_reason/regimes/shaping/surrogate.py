"""The outer problem's Gaussian process, by BoTorch (extra `shaping`), which is imported here alone.

The process sees all K weights of a point, though K - 1 say it all: to a kernel of K - 1, weight that moves to the last
explainer moves less than between two others, and what is found depends on the order of the explainers.

Shape letters: N evaluated points, K weights.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lit_reason.errors import UserError
from lit_reason.regimes.shaping.simplex import on_simplex, sobol_points

STARTS, CANDIDATES, DRAWS, STEPS = 4, 256, 64, 30
LEAST_NOISE = 1e-4  # share of the variance of the values below which a noise is taken for 0 and does harm


def propose(points_NK: Tensor, value_N: Tensor, variance_N: Tensor, seed: int) -> Tensor:
    """The next point: where the noisy expected improvement is highest (qLogNoisyExpectedImprovement, arXiv 2310.20708).

    Args:
        points_NK: evaluated points, on the simplex.
        value_N: what was observed there.
        variance_N: variance of each observation.
        seed: of the draws; the global random state is left alone.

    Returns:
        `float64 [K]` on the simplex.

    Raises:
        UserError: BoTorch is not installed.
    """
    with _botorch(seed):
        from botorch.optim import optimize_acqf

        K = points_NK.shape[1]
        improvement = _improvement(points_NK, value_N, variance_N, seed)
        candidates = sobol_points(CANDIDATES, K, seed)[:, None]
        with torch.no_grad():
            best = improvement(candidates).topk(STARTS).indices
        found, _ = optimize_acqf(
            improvement,
            bounds=torch.stack([torch.zeros(K), torch.ones(K)]).double(),
            q=1,
            num_restarts=STARTS,
            batch_initial_conditions=candidates[best],
            equality_constraints=[(torch.arange(K), torch.ones(K, dtype=torch.float64), 1.0)],
            options={"maxiter": STEPS},
        )
        return on_simplex(found[0].detach())


def acquisition(points_NK: Tensor, value_N: Tensor, variance_N: Tensor, at_MK: Tensor, seed: int = 0) -> Tensor:
    """Logarithm of the noisy expected improvement, which `propose` maximises.

    Args:
        points_NK: evaluated points.
        value_N: what was observed there.
        variance_N: variance of each observation.
        at_MK: where to look.
        seed: of the draws.

    Returns:
        `float64 [M]`.
    """
    with _botorch(seed):
        improvement = _improvement(points_NK, value_N, variance_N, seed)
        with torch.no_grad():
            return improvement(at_MK[:, None])


def _improvement(points_NK: Tensor, value_N: Tensor, variance_N: Tensor, seed: int) -> Any:
    from botorch.acquisition.logei import qLogNoisyExpectedImprovement
    from botorch.sampling import SobolQMCNormalSampler

    process = _process(points_NK, value_N, variance_N)
    sampler = SobolQMCNormalSampler(torch.Size([DRAWS]), seed=seed)
    return qLogNoisyExpectedImprovement(process, points_NK, sampler=sampler, prune_baseline=True)


def posterior(
    points_NK: Tensor, value_N: Tensor, variance_N: Tensor, at_MK: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the process.

    Args:
        points_NK: evaluated points.
        value_N: what was observed there.
        variance_N: variance of each observation.
        at_MK: where to look; default: at the evaluated points.

    Returns:
        `float64 [M]` each.
    """
    with _botorch(0), torch.no_grad():
        with torch.enable_grad():
            process = _process(points_NK, value_N, variance_N)
        found = process.posterior(points_NK if at_MK is None else at_MK)
        return found.mean[:, 0], found.variance[:, 0].clamp(min=0).sqrt()


def _process(points_NK: Tensor, value_N: Tensor, variance_N: Tensor) -> Any:
    """SingleTaskGP with a Matern-5/2 kernel, the observed noise, and noise on top of it whose size is fitted.

    What is observed is how far held-out answers scatter. Two inner runs with the same weights and other draws scatter
    more; without noise for that, the kernel takes the difference of neighbours for detail of the objective.
    One length scale for all weights: one for each is more than some twenty trials can tell.
    """
    from botorch.fit import fit_gpytorch_mll
    from botorch.models import SingleTaskGP
    from botorch.models.transforms import Standardize
    from botorch.models.utils.gpytorch_modules import get_matern_kernel_with_gamma_prior
    from gpytorch.likelihoods import FixedNoiseGaussianLikelihood
    from gpytorch.mlls import ExactMarginalLogLikelihood

    spread = float(value_N.var()) if len(value_N) > 1 else 0.0
    noise_N = variance_N.clamp(min=max(LEAST_NOISE * spread, 1e-8)) / (spread or 1.0)  # of standardised values
    process = SingleTaskGP(
        points_NK,
        value_N[:, None],
        likelihood=FixedNoiseGaussianLikelihood(noise_N, learn_additional_noise=True),
        covar_module=get_matern_kernel_with_gamma_prior(1),
        outcome_transform=Standardize(1),
    )
    fit_gpytorch_mll(ExactMarginalLogLikelihood(process.likelihood, process))
    return process


@contextlib.contextmanager
def _botorch(seed: int) -> Iterator[None]:
    """BoTorch without its warnings about small numbers, and with random numbers of its own."""
    try:
        import botorch  # noqa: F401
    except ImportError as error:
        raise UserError(
            "search.propose bayes needs the botorch package: pip install 'lit-reason[shaping]', or set propose: random"
        ) from error
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        yield
