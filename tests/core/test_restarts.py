"""The rule that says after which steps a low-rank run restarts."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_reason.core.restarts import is_restart, last_restart


def restarts(total, warmup, period, recovery):
    return [step for step in range(total + 1) if is_restart(step, total, warmup, period, recovery)]


@pytest.mark.parametrize(
    "total, warmup, period, recovery, steps",
    [
        (100, 0, 20, 2, [20, 40, 60, 80]),  # 20 left after 80: half a period and twice the recovery fit
        (100, 40, 20, 2, [40, 60, 80]),  # the step that ends the warm-up counts
        (100, 41, 20, 2, [60, 80]),
        (89, 0, 20, 2, [20, 40, 60]),  # 9 steps left after 80, half a period are 10
        (90, 0, 20, 2, [20, 40, 60, 80]),
        (100, 0, 20, 11, [20, 40, 60]),  # two recoveries are 22 steps
        (100, 0, 1000, 10, []),
    ],
)
def test_restarts_by_hand(total, warmup, period, recovery, steps):
    assert restarts(total, warmup, period, recovery) == steps


@given(st.integers(1, 80), st.integers(0, 80), st.integers(1, 30), st.integers(0, 30))
def test_the_last_restart_is_the_latest_of_all_before(total, warmup, period, recovery):
    made = restarts(total, warmup, period, recovery)
    for step in range(total + 1):
        before = [s for s in made if s <= step]
        assert last_restart(step, total, warmup, period, recovery) == (before[-1] if before else None)
