"""Intervals around measured rates and means, and pass@k."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist


def wilson(successes: float, n: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson score interval of a proportion (Wilson 1927, JASA 22:209).

    With p = successes / n and z the two-sided normal quantile of `level`:
    (p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n).

    Unlike p +- z sqrt(p(1-p)/n) it stays inside [0, 1] and does not collapse at p = 0 or 1.

    `n` is the number of *independent* trials. For an evaluation that is the number of prompts, also when
    several samples were drawn for each: samples of one prompt share its difficulty, so counting them as
    trials would make the interval too narrow. `successes` is then the sum over prompts of each prompt's
    success rate; a rate in [0, 1] varies at most as much as a 0/1 outcome of the same mean, so the interval
    errs on the wide side.

    Args:
        successes: number of successes, or sum of success rates; in [0, n].
        n: number of independent trials.
        level: confidence level in (0, 1).

    Returns:
        Lower and upper end; (0, 1) for n = 0, where nothing is known.

    Raises:
        ValueError: an argument is out of range.
    """
    if n < 0 or not -1e-9 <= successes <= n + 1e-9 or not 0 < level < 1:
        raise ValueError(f"wilson needs 0 <= successes <= n and 0 < level < 1, got {successes}, {n}, {level}")
    if n == 0:
        return 0.0, 1.0
    z2 = NormalDist().inv_cdf((1 + level) / 2) ** 2
    p = min(max(successes / n, 0.0), 1.0)
    centre = p + z2 / (2 * n)
    half = math.sqrt(z2 * (p * (1 - p) / n + z2 / (4 * n * n)))
    scale = 1 + z2 / n
    # The interval holds p; at p = 0 and 1 rounding would push an end just past it.
    return min(max((centre - half) / scale, 0.0), p), max(min((centre + half) / scale, 1.0), p)


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Unbiased estimate of the chance that one of k samples is correct (arXiv 2107.03374, eq. 1).

    1 - C(samples - correct, k) / C(samples, k): the share of the k-subsets of the drawn samples that hold a
    correct one.

    Args:
        samples: samples drawn for the prompt.
        correct: how many of them are correct.
        k: size of the subsets, at most `samples`.

    Returns:
        A probability.

    Raises:
        ValueError: an argument is out of range.
    """
    if not 0 <= correct <= samples or not 1 <= k <= samples:
        raise ValueError(f"pass@{k} needs 0 <= correct <= samples and 1 <= k <= samples, got {correct} of {samples}")
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


def bootstrap_ratio(
    numerator: Sequence[float], denominator: Sequence[float], *, level: float = 0.95, draws: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of sum(numerator) / sum(denominator) over independent units (Efron 1979).

    Whole units are drawn with replacement, so a mean over tokens gets the spread that the texts they come from have.

    Args:
        numerator: one value a unit, such as a text's summed loss.
        denominator: one positive value a unit, such as its tokens.
        level: confidence level in (0, 1).
        draws: number of resamples.
        seed: of the resamples; equal arguments give equal intervals.

    Returns:
        Lower and upper end.

    Raises:
        ValueError: no unit, unequal lengths, a denominator that is not positive, or a level out of range.
    """
    import numpy as np

    top, bottom = np.asarray(numerator, dtype=np.float64), np.asarray(denominator, dtype=np.float64)
    n = len(top)
    if not n or len(bottom) != n or not (bottom > 0).all() or not 0 < level < 1:
        raise ValueError(f"bootstrap_ratio: {n} numerators, {len(bottom)} denominators (all > 0?), level {level}")
    rng = np.random.default_rng(seed)
    ratios = np.empty(draws)
    for draw in range(draws):
        chosen = rng.integers(n, size=n)
        ratios[draw] = top[chosen].sum() / bottom[chosen].sum()
    low, high = np.quantile(ratios, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
