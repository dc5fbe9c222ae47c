"""Loop detection against its definition, tried in every period."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_reason.metrics.repetition import tail_repeats


def by_definition(ids, copies, min_tokens):
    for period in range(1, len(ids)):
        stretch = period
        while stretch < len(ids) and ids[-1 - stretch] == ids[-1 - stretch + period]:
            stretch += 1
        if stretch >= copies * period and stretch >= min_tokens:
            return True
    return False


@given(
    st.lists(st.integers(0, 2), max_size=12),
    st.lists(st.integers(0, 2), min_size=1, max_size=4),
    st.integers(0, 6),
    st.integers(0, 3),
    st.integers(2, 5),
    st.integers(1, 20),
)
def test_equals_the_definition(start, piece, times, cut, copies, min_tokens):
    ids = start + piece * times + piece[:cut]
    assert tail_repeats(ids, copies=copies, min_tokens=min_tokens) == by_definition(ids, copies, min_tokens)


@pytest.mark.parametrize(
    ("ids", "loops"),
    [
        ([9, 8] + [1, 2, 3, 4] * 4, True),
        ([9, 8] + [1, 2, 3, 4] * 3 + [1, 2, 3], False),  # the fourth copy is not there yet
        ([9, 8] + [1, 2, 3, 4] * 4 + [1, 2], True),  # cut inside the fifth
        ([1, 2, 3, 4] * 8 + [5], False),  # got out of the loop
        ([7] * 15, False),
        ([7] * 16, True),
        ([], False),
        ([1], False),
    ],
)
def test_known_tails(ids, loops):
    assert tail_repeats(ids) is loops


def test_time_is_linear_in_the_worst_case():
    start = time.perf_counter()
    assert not tail_repeats([0] * 40_000 + [1] + [0] * 10)
    assert tail_repeats([1] + [0] * 40_000)
    assert time.perf_counter() - start < 5  # quadratic work would be 10^9 comparisons, minutes
