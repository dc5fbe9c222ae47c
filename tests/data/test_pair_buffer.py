"""The pair buffer: what goes in comes out, once; replay picks what it says; a checkpoint brings back just its pairs."""

from __future__ import annotations

import numpy as np
import pytest

from lit_reason.data.pair_buffer import Pair, PairBuffer
from lit_reason.errors import UserError


def pair(row: int, rejected: list[int], sample: int = 0) -> Pair:
    return Pair(row, sample, np.array([1, row]), np.array([2, 3]), np.array(rejected))


def filled(folder) -> PairBuffer:
    """Three rounds of three pairs; the second repeats one of the first."""
    buffer = PairBuffer(folder)
    for number in range(3):
        answers = [[10 * number + row] for row in range(3)]
        if number == 1:
            answers[0] = [0]
        buffer.append(number, 4 * number, 0, [pair(row, answer) for row, answer in enumerate(answers)])
    return buffer


def contents(buffer: PairBuffer, chosen) -> list[tuple[int, list[int]]]:
    return [(p.row, p.rejected.tolist()) for p in map(buffer.pair, chosen)]


def test_pairs_come_back_as_they_were(tmp_path):
    buffer = PairBuffer(tmp_path)
    given = [Pair(7, 1, np.array([4, 5, 6]), np.array([8]), np.array([9, 9])), pair(2, [])]
    assert buffer.append(0, 0, 0, given) == 0
    for i, expected in enumerate(given):
        found = buffer.pair(i)
        for name in ("row", "sample"):
            assert getattr(found, name) == getattr(expected, name)
        for name in ("prompt", "chosen", "rejected"):
            assert getattr(found, name).tolist() == getattr(expected, name).tolist()


def test_a_repeated_pair_is_stored_once_and_told(tmp_path):
    buffer = PairBuffer(tmp_path)
    buffer.append(0, 0, 0, [pair(0, [5])])
    size = (tmp_path / "tokens.bin").stat().st_size
    assert buffer.append(1, 0, 0, [pair(0, [5]), pair(0, [5, 5])]) == 1
    assert (tmp_path / "tokens.bin").stat().st_size == size + 4 * 6
    # the same tokens cut elsewhere are another pair
    other = Pair(0, 0, np.array([1]), np.array([0, 2, 3]), np.array([5]))
    assert buffer.append(2, 0, 0, [other]) == 0


def test_identical_answers_are_seen():
    assert pair(0, [2, 3]).identical and not pair(0, [2, 4]).identical


def test_replay_takes_what_it_says(tmp_path):
    buffer = filled(tmp_path)
    assert contents(buffer, buffer.select(2, "last")) == [(0, [20]), (1, [21]), (2, [22])]
    everything = contents(buffer, buffer.select(2, "all"))
    assert everything == [(0, [0]), (1, [1]), (2, [2]), (1, [11]), (2, [12]), (0, [20]), (1, [21]), (2, [22])]
    assert contents(buffer, buffer.select(2, "all", first=1)) == [(0, [0]), *everything[3:]]
    assert contents(buffer, buffer.select(1, "last")) == [(0, [0]), (1, [11]), (2, [12])]  # repeated, yet its own
    assert len(buffer.select(1, "all")) == 5


@pytest.mark.parametrize(("mixture", "earlier"), [(0.0, 0), (0.25, 1), (0.5, 3), (0.9, 5)])
def test_a_mixture_draws_its_share_of_earlier_rounds(tmp_path, mixture, earlier):
    buffer = filled(tmp_path)
    chosen = buffer.select(2, "mixture", mixture=mixture, seed=3)
    assert (buffer.index[chosen, 0] < 2).sum() == earlier and (buffer.index[chosen, 0] == 2).sum() == 3
    assert np.array_equal(chosen, buffer.select(2, "mixture", mixture=mixture, seed=3))
    assert len(np.unique(chosen)) == len(chosen)


def test_restore_drops_what_came_after_the_checkpoint(tmp_path):
    buffer = PairBuffer(tmp_path)
    buffer.append(0, 0, 0, [pair(0, [5]), pair(1, [6])])
    state = buffer.state()
    buffer.append(1, 8, 0, [pair(0, [7])])
    buffer.restore(state, number=1, step=6)  # that round was sampled after step 8, not 6
    assert contents(buffer, range(len(buffer))) == [(0, [5]), (1, [6])]
    assert buffer.append(1, 6, 0, [pair(0, [7])]) == 0, "what was dropped is not known any more"
    assert buffer.append(1, 6, 1, [pair(0, [5])]) == 1
    assert contents(buffer, [2]) == [(0, [7])]


def test_chunks_of_the_round_under_way_are_kept(tmp_path):
    buffer = PairBuffer(tmp_path)
    buffer.append(0, 0, 0, [pair(0, [5])])
    state = buffer.state()
    for chunk in range(2):
        buffer.append(1, 8, chunk, [pair(chunk, [7])], {"sampled": 3})
    buffer.counts.clear()
    assert buffer.restore(state, number=1, step=8) == 2
    assert (buffer.counts["sampled"], buffer.counts["repeated"]) == (6, 0)
    assert contents(buffer, buffer.select(1, "last")) == [(0, [7]), (1, [7])]


def test_another_run_copies_the_pairs_of_the_one_it_goes_on_from(tmp_path):
    old = filled(tmp_path / "old")
    state = old.state()
    new = PairBuffer(tmp_path / "new")
    assert new.restore(state, number=3, step=12) == 0
    new.append(3, 12, 0, [pair(0, [30])])
    assert contents(new, [0, 9]) == [(0, [0]), (0, [30])]
    assert len(old) == 9 and (tmp_path / "old/index.bin").stat().st_size == 9 * 7 * 8


def test_a_missing_or_cut_file_is_named(tmp_path):
    state = filled(tmp_path / "old").state()
    (tmp_path / "old/tokens.bin").write_bytes(b"\0" * 8)
    with pytest.raises(UserError, match=r"9 pairs in .*old, but tokens.bin there is missing or shorter"):
        PairBuffer(tmp_path / "new").restore(state, number=3, step=12)
