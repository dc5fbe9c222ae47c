"""Packs, bins and the order of batches."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_reason.data.loader import BinSampler
from lit_reason.data.packing import fill_bins, pack_rows
from lit_reason.data.token_row import TokenRow
from lit_reason.errors import UserError

lengths_st = st.lists(st.integers(1, 50), min_size=1, max_size=60)


def make_row(ids, weight, row_id="r"):
    n = len(ids)
    return TokenRow(
        np.array(ids, np.int32), np.array(weight, np.float32), np.arange(n).astype(np.uint8) % 10,
        np.full(n, -1, np.int8), row_id,
    )  # fmt: skip


def make_sampler(lengths, **kwargs):
    lengths = np.asarray(lengths)
    settings = {"batch_tokens": 50, "shuffle": True} | kwargs
    return BinSampler(lengths, lengths * 0.5, **settings)


def test_pack_by_hand():
    pack = pack_rows([make_row([5, 6, 7], [0, 1, 0.5], "a"), make_row([8, 9], [0, 2], "b")])
    assert pack.ids.tolist() == [5, 6, 7, 8, 9]
    assert pack.positions.tolist() == [0, 1, 2, 0, 1]
    assert pack.cu_seqlens.tolist() == [0, 3, 5] and pack.cu_seqlens.dtype == torch.int32
    assert pack.lengths == (3, 2)
    # hidden row t-1 predicts token t
    assert pack.index.tolist() == [0, 1, 3]
    assert pack.targets.tolist() == [6, 7, 9]
    assert pack.target_weight.tolist() == [1, 0.5, 2]
    assert pack.target_segment.tolist() == [1, 2, 1]
    assert pack.norm == 3.5
    assert pack.row_ids == ("a", "b")


def test_untrained_pack_keeps_its_tokens_and_selects_none():
    pack = pack_rows([make_row([1, 2], [0, 1])], norm=7.0, trained=False)
    assert pack.ids.tolist() == [1, 2] and pack.index.numel() == 0 and pack.norm == 7.0


@given(lengths_st)
def test_bins_hold_every_row_once_and_never_overflow(lengths):
    bins = fill_bins(lengths, 50)
    assert Counter(i for b in bins for i in b) == Counter(range(len(lengths)))
    assert all(0 < sum(lengths[i] for i in b) <= 50 for b in bins)
    # best fit decreasing: no two bins could be one, so more than half of the room is used
    sizes = sorted(sum(lengths[i] for i in b) for b in bins)
    assert len(sizes) < 2 or sizes[0] + sizes[1] > 50


def test_bins_by_hand():
    assert sorted(sorted(b) for b in fill_bins([6, 4, 5, 5, 10], 10)) == [[0, 1], [2, 3], [4]]


def test_a_row_longer_than_a_bin_is_refused():
    with pytest.raises(UserError, match="batch_tokens is 10.*11 tokens"):
        fill_bins([3, 11], 10)


@settings(max_examples=50)
@given(lengths_st, st.integers(0, 3), st.integers(1, 3), st.booleans())
def test_every_epoch_has_every_row_once_over_all_ranks(lengths, epoch, world, by_rows):
    extra = {"batch_tokens": None, "batch_rows": 4} if by_rows else {}
    samplers = [make_sampler(lengths, rank=r, world=world, **extra) for r in range(world)]
    for s in samplers:
        s.epoch = epoch
    drawn = [list(s) for s in samplers]
    assert len({len(d) for d in drawn}) == 1 and len(drawn[0]) == len(samplers[0])
    assert Counter(i for d in drawn for b in d for i in b.rows) == Counter(range(len(lengths)))


@settings(max_examples=50)
@given(lengths_st, st.integers(1, 3), st.integers(1, 4))
def test_norm_is_the_weight_of_the_whole_optimizer_step(lengths, world, accumulate):
    drawn = [list(make_sampler(lengths, rank=r, world=world, accumulate=accumulate)) for r in range(world)]
    for first in range(0, len(drawn[0]), accumulate):
        step = [b for d in drawn for b in d[first : first + accumulate]]
        weight = sum(lengths[i] * 0.5 for b in step for i in b.rows)
        assert all(b.norm == pytest.approx(weight) for b in step if weight)


@given(lengths_st)
def test_epochs_differ_but_keep_their_number_of_bins(lengths):
    sampler = make_sampler(lengths)
    plans = [sampler.plan(e) for e in range(3)]
    assert len({len(p) for p in plans}) == 1
    assert all(sum(lengths[i] for i in b) <= 50 for p in plans for b in p)
    assert sampler.plan(1) == make_sampler(lengths).plan(1)


def test_rows_of_equal_length_change_company():
    sampler = make_sampler([10] * 40)
    assert {frozenset(b) for b in sampler.plan(0)} != {frozenset(b) for b in sampler.plan(1)}


def test_without_shuffling_rows_keep_their_order():
    sampler = make_sampler([5] * 7, batch_tokens=None, batch_rows=3, shuffle=False)
    assert [b.rows for b in sampler] == [(0, 1, 2), (3, 4, 5), (6,)]


def test_start_skips_what_was_handed_out():
    full = list(make_sampler([7] * 30, accumulate=2))
    later = make_sampler([7] * 30, accumulate=2)
    later.start = 2
    assert list(later) == full[2:]


def passes(sampler, epochs):
    """What each of Lightning's epochs would hand out; `drawn` is what the loader sets."""
    seen = []
    for epoch, draws in epochs:
        sampler.set_epoch(epoch)
        if draws:
            seen.append((sampler.epoch, sampler.start))
            sampler.drawn = True
    return seen


def test_passes_follow_each_other():
    assert passes(make_sampler([50] * 5), [(0, True), (1, True), (2, True)]) == [(0, 0), (1, 0), (2, 0)]


@pytest.mark.parametrize(
    "position, epochs, expected",
    [
        (2, [(0, True), (1, True)], [(0, 2), (1, 0)]),  # within an epoch
        (5, [(0, False), (1, True), (2, True)], [(1, 0), (2, 0)]),  # at its end, before Lightning counted it
        (5, [(1, False), (2, True), (3, True)], [(1, 0), (2, 0)]),  # at its end, announced twice
        (2, [(1, True), (2, True)], [(0, 2), (1, 0)]),  # stopped at max_steps: the rest of the pass still comes
    ],
)
def test_a_restored_pass_is_finished_before_the_next(position, epochs, expected):
    sampler = make_sampler([50] * 5)
    sampler.start = position
    assert passes(sampler, epochs) == expected
