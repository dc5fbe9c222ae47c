"""Intervals and pass@k against published values, defining equations, and enumeration."""

from __future__ import annotations

import math
from itertools import combinations
from statistics import NormalDist

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_reason.metrics.intervals import pass_at_k, wilson


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [  # Newcombe 1998 (Statistics in Medicine 17:857), table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_equals_published_values(successes, n, low, high):
    assert wilson(successes, n) == pytest.approx((low, high), abs=5e-5)


@given(
    st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))),
    st.sampled_from([0.8, 0.95, 0.99]),
)
def test_wilson_ends_are_where_the_score_test_turns(pair, level):
    """The ends are the two values q with |p - q| = z sqrt(q(1-q)/n): the test that the interval inverts."""
    successes, n = pair
    z = NormalDist().inv_cdf((1 + level) / 2)
    low, high = wilson(successes, n, level)
    assert 0 <= low <= successes / n <= high <= 1
    for end in (low, high):
        if 0 < end < 1:
            assert abs(successes / n - end) == pytest.approx(z * math.sqrt(end * (1 - end) / n), rel=1e-6, abs=1e-9)
    assert (low == 0 or successes > 0) and (high == 1 or successes < n)
    mirrored = wilson(n - successes, n, level)
    assert (1 - mirrored[1], 1 - mirrored[0]) == pytest.approx((low, high), abs=1e-12)


def test_wilson_narrows_with_prompts_and_widens_with_level():
    width = [high - low for low, high in (wilson(0.5 * n, n) for n in (5, 50, 500))]
    assert width[0] > width[1] > width[2]
    assert wilson(7, 20, 0.99)[0] < wilson(7, 20, 0.9)[0]
    assert wilson(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize("arguments", [(3, 2), (-1, 5), (1, -1), (1, 2, 1.0), (1, 2, 0.0)])
def test_wilson_refuses(arguments):
    with pytest.raises(ValueError, match="wilson needs"):
        wilson(*arguments)


def test_pass_at_k_is_the_share_of_subsets_with_a_correct_sample():
    for samples in range(1, 8):
        for correct in range(samples + 1):
            for k in range(1, samples + 1):
                subsets = list(combinations([True] * correct + [False] * (samples - correct), k))
                expected = sum(any(s) for s in subsets) / len(subsets)
                assert pass_at_k(samples, correct, k) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("arguments", [(2, 3, 1), (2, 1, 3), (2, -1, 1), (2, 1, 0)])
def test_pass_at_k_refuses(arguments):
    with pytest.raises(ValueError, match="pass@"):
        pass_at_k(*arguments)
