"""The same place in the data, counted by another number of processes."""

import copy

import numpy as np
import pytest

from lit_reason.core.world_size import fit_progress
from lit_reason.data.loader import BinSampler
from lit_reason.errors import UserError


def sampler(world, rank=0, accumulate=1, rows=11):
    ones = np.ones(rows)
    return BinSampler(ones, ones, batch_tokens=None, shuffle=True, accumulate=accumulate, rank=rank, world=world)


@pytest.mark.parametrize("then, steps", [(1, 4), (2, 2), (4, 1)])
@pytest.mark.parametrize("now", [1, 2, 4])
def test_a_pass_goes_on_with_the_bins_not_yet_handed_out(then, steps, now):
    """Eleven bins, four a step, whatever the number of processes."""
    state = {"epoch": 0, "position": steps, "world": then}
    rest = []
    for rank in range(now):
        one = sampler(now, rank, accumulate=4 // now)
        one.start = one.position(state)
        rest += [row for chosen in one for row in chosen.rows]
    assert sorted(rest) == sorted(row for rows in sampler(1).plan(0)[4:] for row in rows)


@pytest.mark.parametrize("then, position", [(1, 11), (2, 6), (5, 3)])  # eleven bins; twelve and fifteen places
def test_a_finished_pass_is_finished_for_any_number(then, position):
    for now in {1, 2, 3, 4} - {then}:
        assert sampler(now).position({"epoch": 0, "position": position, "world": then}) == len(sampler(now))


def test_a_place_within_a_step_of_the_new_run_is_refused():
    with pytest.raises(UserError, match="3 processes x 2 accumulated"):
        sampler(3, accumulate=2).position({"epoch": 0, "position": 1, "world": 2})


def test_one_process_is_as_before_at_any_place():
    for state in ({"epoch": 0, "position": 3, "world": 2}, {"epoch": 0, "position": 3}):
        assert sampler(2, accumulate=2).position(state) == 3


def counters(ready, processed, completed):
    return {"ready": ready, "started": ready, "processed": processed, "completed": completed}


def saved(world, total, current):
    loop = {
        "state_dict": {"combined_loader": [{"epoch": 1, "position": 4, "world": world}]},
        "epoch_loop.batch_progress": {"total": total, "current": current, "is_last_batch": False},
    }
    return {"loops": {"fit_loop": loop}}


@pytest.mark.parametrize("then, now, total, current", [(2, 1, 20, 8), (1, 2, 5, 2), (4, 1, 40, 16), (4, 3, 14, 6)])
def test_counters_keep_where_in_the_batch_they_were_taken(then, now, total, current):
    checkpoint = saved(then, counters(10, 10, 9), counters(4, 4, 3))
    fit_progress(checkpoint, now)
    found = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    assert found["total"] == counters(total, total, total - 1)
    assert found["current"] == counters(current, current, current - 1)
    assert found["is_last_batch"] is False


@pytest.mark.parametrize(
    "checkpoint", [saved(2, counters(3, 3, 2), counters(1, 1, 1)), {}, {"loops": {"fit_loop": {}}}]
)
def test_as_many_processes_or_weights_alone_change_nothing(checkpoint):
    before = copy.deepcopy(checkpoint)
    fit_progress(checkpoint, 2)
    assert checkpoint == before
