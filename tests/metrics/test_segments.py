"""SegmentMeter against sums made by hand and by loops."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lit_reason.data.token_row import Segment
from lit_reason.metrics.segments import SegmentMeter


def meter_of(rows):
    """A meter that has seen rows of (logp, entropy, hit, weight, segment, decile)."""
    meter = SegmentMeter()
    if rows:
        columns = [torch.tensor(c) for c in zip(*rows, strict=True)]
        meter.update(*columns)
    return meter


def test_means_by_hand():
    rows = [
        (-1.0, 0.5, True, 1.0, int(Segment.UNDERSTANDING), 0),
        (-3.0, 1.5, False, 2.0, int(Segment.UNDERSTANDING), 0),
        (-2.0, 1.0, True, 0.5, int(Segment.CONVERGENCE), 9),
        (-0.5, 0.1, False, 1.0, int(Segment.END), -1),
    ]
    out = {name: float(value) for name, value in meter_of(rows).compute().items()}
    assert out["loss"] == pytest.approx((1 + 6 + 1 + 0.5) / 4.5)  # weighted
    assert out["entropy"] == pytest.approx(3.1 / 4)
    assert out["accuracy"] == pytest.approx(0.5)
    assert out["loss_understanding"] == pytest.approx(2.0)  # not weighted
    assert out["entropy_understanding"] == pytest.approx(1.0)
    assert out["accuracy_understanding"] == pytest.approx(0.5)
    assert out["loss_end"] == pytest.approx(0.5)
    assert out["loss_decile_0"] == pytest.approx(2.0) and out["loss_decile_9"] == pytest.approx(2.0)
    assert out["entropy_decile_0"] == pytest.approx(1.0) and out["accuracy_decile_9"] == pytest.approx(1.0)
    assert not {"loss_exploration", "loss_decile_1", "loss_prompt"} & out.keys()


def test_nothing_seen_gives_no_figures():
    assert meter_of([]).compute() == {}


row = st.tuples(
    st.floats(-9, 0), st.floats(0, 9), st.booleans(), st.floats(0.1, 4), st.integers(0, 9), st.integers(-1, 9)
)


@given(st.lists(row, min_size=1, max_size=30), st.integers(0, 30))
def test_parts_add_up_to_the_whole(rows, cut):
    """Two updates are one; segments, weighted by their counts, give the mean; deciles leave out what is no thought."""
    whole, parts = meter_of(rows).compute(), SegmentMeter()
    for part in (rows[:cut], rows[cut:]):
        if part:
            parts.update(*[torch.tensor(c) for c in zip(*part, strict=True)])
    split = parts.compute()
    assert split.keys() == whole.keys()
    assert all(math.isclose(split[k], whole[k], rel_tol=1e-5, abs_tol=1e-6) for k in whole)
    mean = sum(-r[0] for r in rows) / len(rows)
    by_segment = sum(
        float(whole[f"loss_{s.name.lower()}"]) * sum(r[4] == s for r in rows)
        for s in Segment
        if any(r[4] == s for r in rows)
    )
    assert by_segment / len(rows) == pytest.approx(mean, rel=1e-5, abs=1e-5)
    assert {f"loss_decile_{r[5]}" for r in rows if r[5] >= 0} == {k for k in whole if k.startswith("loss_decile")}
