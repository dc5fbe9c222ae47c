"""Loop detection against its definition, tried in every period."""

from __future__ import annotations

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


def test_work_is_linear_in_the_worst_case():
    class Counted(list):
        """Counts how often it is asked for an item."""

        asked = 0

        def __getitem__(self, where):
            if isinstance(where, slice):
                return Counted(super().__getitem__(where))
            Counted.asked += 1
            return super().__getitem__(where)

    n = 4000
    for ids, loops in (([0] * n + [1] + [0] * 10, False), ([1] + [0] * n, True), ([0, 1] * (n // 2), True)):
        Counted.asked = 0
        assert tail_repeats(Counted(ids)) is loops
        assert Counted.asked <= 5 * n  # quadratic work would ask 10^7 times
