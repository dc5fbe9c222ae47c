"""Trials of the outer problem, and which one comes next: pure functions of the trials so far."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor

from lit_reason.regimes.shaping.config import SearchConfig
from lit_reason.regimes.shaping.simplex import initial_points, sobol_points

LEAST_FINISHED = 3  # earlier runs without which none is stopped early


@dataclass(frozen=True)
class Trial:
    """An inner run.

    Attributes:
        number: from 0, in the order in which they were begun.
        kind: `search`, `rerun` of one of the best points, or `final`.
        weights: of the explainers.
        status: `running`, `finished`, `stopped` early, or `diverged`.
        objective: mean unshaped score on held-out prompts, less the weighted divergence; None while it runs and where
            it diverged.
        variance: of the objective, its squared standard error.
        curve: mean unshaped score of each round of rollouts.
        facts: what it cost, and the parts of the objective.
    """

    number: int
    kind: str
    weights: tuple[float, ...]
    status: str = "running"
    objective: float | None = None
    variance: float | None = None
    curve: tuple[float, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)


def observations(trials: Sequence[Trial]) -> tuple[Tensor, Tensor, Tensor]:
    """What the surrogate is fitted to: every ended trial of the search and every rerun.

    A run that diverged is not dropped, or its neighbourhood would be tried again: it counts as the worst value seen
    less one standard deviation of the values, with that deviation as its noise.

    Returns:
        Points `[N, K]`, values `[N]`, variances `[N]`, in float64.
    """
    ended = [t for t in trials if t.kind != "final" and t.status != "running"]
    sound = [t.objective for t in ended if t.objective is not None]
    low = min(sound, default=0.0)
    spread = float(torch.tensor(sound, dtype=torch.float64).std()) if len(sound) > 1 else 0.0
    spread = spread or abs(low) or 1.0
    values = [low - spread if t.objective is None else t.objective for t in ended]
    variances = [spread**2 if t.objective is None else t.variance or 0.0 for t in ended]
    points = torch.tensor([t.weights for t in ended], dtype=torch.float64)
    return points, torch.tensor(values, dtype=torch.float64), torch.tensor(variances, dtype=torch.float64)


def next_trial(trials: Sequence[Trial], config: SearchConfig, explainers: Sequence[str]) -> tuple[str, Tensor] | None:
    """Kind and weights of the next inner run.

    Args:
        trials: all that were begun, of all processes.
        config: the search.
        explainers: names, in the order of the weights.

    Returns:
        None when nothing can be begun: the search is over, or what comes next depends on runs of other processes.
    """
    K = len(explainers)
    if K == 1:
        return None if trials else ("final", torch.ones(1, dtype=torch.float64))
    searched = [t for t in trials if t.kind == "search"]
    if len(searched) < config.trials:
        return "search", _point(len(searched), trials, config, explainers)
    if any(t.status == "running" for t in searched):
        return None
    reruns = [t for t in trials if t.kind == "rerun"]
    if len(reruns) < min(config.reruns, config.trials):
        return "rerun", torch.tensor(best(searched, config)[len(reruns)], dtype=torch.float64)
    if any(t.status == "running" for t in reruns) or any(t.kind == "final" for t in trials):
        return None
    return "final", torch.tensor(best(trials, config)[0], dtype=torch.float64)


def over(trials: Sequence[Trial]) -> bool:
    """Whether the final run was begun, after which there is nothing to do for anybody else."""
    return any(t.kind == "final" for t in trials)


def best(trials: Sequence[Trial], config: SearchConfig) -> list[tuple[float, ...]]:
    """Evaluated points by what the surrogate expects of them, best first; not by the best observation, which is luck.

    Args:
        trials: ended ones count.
        config: `propose: random` has no surrogate, and takes means of observations.
    """
    points, values, variances = observations(trials)
    if config.propose == "bayes" and len(values) > 1:
        from lit_reason.regimes.shaping.surrogate import posterior

        values, _ = posterior(points, values, variances)
    found: dict[tuple[float, ...], list[float]] = {}
    for point, value in zip(points.tolist(), values.tolist(), strict=True):
        found.setdefault(tuple(point), []).append(value)
    return sorted(found, key=lambda point: -sum(found[point]) / len(found[point]))


def _point(number: int, trials: Sequence[Trial], config: SearchConfig, explainers: Sequence[str]) -> Tensor:
    count = min(config.initial, config.trials)
    if number < count:
        return initial_points(explainers, count, config.seed)[number]
    if config.propose == "random":
        return sobol_points(number + 1, len(explainers), config.seed + 1)[number]
    from lit_reason.regimes.shaping.surrogate import propose

    # Points that other processes are at count as if their means were known, or two of them would go to one place.
    points, values, variances = observations(trials)
    pending = torch.tensor([t.weights for t in trials if t.status == "running"], dtype=torch.float64)
    if len(pending) and len(values) > 1:
        from lit_reason.regimes.shaping.surrogate import posterior

        believed, _ = posterior(points, values, variances, pending)
        points, values = torch.cat([points, pending]), torch.cat([values, believed])
        variances = torch.cat([variances, variances.mean().expand(len(pending))])
    if len(values) < 2:  # nothing to fit yet: all that came before is still under way
        return sobol_points(number + 1, len(explainers), config.seed)[number]
    return propose(points, values, variances, config.seed + number)


def hopeless(curve: Sequence[float], trials: Sequence[Trial], config: SearchConfig) -> bool:
    """The median rule (Vizier): a run is stopped when its mean score so far is below the median of the earlier runs'.

    Args:
        curve: mean score of each of its rounds so far.
        trials: earlier ones; those of the search that went as far count.
        config: `stop_early` says from which round on.
    """
    r = len(curve)
    if config.stop_early is None or r < math.ceil(config.stop_early * config.rounds):
        return False
    others = [
        sum(t.curve[:r]) / r for t in trials if t.kind == "search" and t.status != "running" and len(t.curve) >= r
    ]
    return len(others) >= LEAST_FINISHED and sum(curve) / r < median(others)
