"""The bootstrap interval of a ratio of sums."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lit_reason.metrics.intervals import bootstrap_ratio


def test_a_constant_ratio_has_no_spread():
    assert bootstrap_ratio([2.0, 4.0, 6.0], [1.0, 2.0, 3.0]) == pytest.approx((2.0, 2.0))


def test_agrees_with_the_normal_interval_of_a_mean():
    values = np.random.default_rng(0).normal(3.0, 2.0, size=400)
    low, high = bootstrap_ratio(values, np.ones(400))
    half = 1.96 * values.std() / math.sqrt(400)
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.1 * half)
    narrow = bootstrap_ratio(values, np.ones(400), level=0.5)
    assert narrow[1] - narrow[0] == pytest.approx((high - low) * 0.674 / 1.96, rel=0.1)


def test_units_are_weighted_by_their_size():
    """One unit of ten tokens at 0 and one of one token at 1: the ratio is 0, 1/11 or 1, never 1/2."""
    low, high = bootstrap_ratio([0.0, 1.0], [10.0, 1.0])
    assert (low, high) == (0.0, 1.0)
    assert bootstrap_ratio([0.0, 1.0], [10.0, 1.0], level=0.4) == pytest.approx((1 / 11, 1 / 11), abs=1e-9)


def test_same_seed_same_interval():
    values = list(range(20))
    assert bootstrap_ratio(values, [1] * 20) == bootstrap_ratio(values, [1] * 20)
    assert bootstrap_ratio(values, [1] * 20) != bootstrap_ratio(values, [1] * 20, seed=1)


@pytest.mark.parametrize(
    ("top", "bottom", "level"), [([], [], 0.9), ([1], [1, 2], 0.9), ([1], [0], 0.9), ([1], [1], 1.0)]
)
def test_refuses(top, bottom, level):
    with pytest.raises(ValueError, match="bootstrap_ratio"):
        bootstrap_ratio(top, bottom, level=level)
