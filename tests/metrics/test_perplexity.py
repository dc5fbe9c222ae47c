"""Perplexity against sums by hand."""

import math

import pytest
import torch

from lit_reason.metrics.perplexity import PerplexityMeter


def test_tokens_count_equally_whatever_their_batch():
    meter = PerplexityMeter()
    meter.update(torch.tensor([-1.0, -3.0]), 6)
    meter.update(torch.tensor([-5.0]), 2)
    found = meter.compute()
    assert found["perplexity"].item() == pytest.approx(math.exp(3.0))
    assert found["bits_per_byte"].item() == pytest.approx(9 / math.log(2) / 8)
    assert set(found) == {"perplexity", "bits_per_byte"}


def test_the_legacy_divisor_is_one_too_large():
    """`total_batches = 1` before the loop, counted up in it: means over n batches are divided by n + 1."""
    meter = PerplexityMeter(legacy_divisor=True)
    total_loss, total_batches = 0.0, 1
    for values in ([-1.0, -3.0], [-5.0], [-2.0, -2.0, -2.0]):
        meter.update(torch.tensor(values), 0)
        total_loss += -sum(values) / len(values)
        total_batches += 1
    found = meter.compute()
    assert found["perplexity_legacy"].item() == pytest.approx(math.exp(total_loss / total_batches))
    assert found["perplexity"].item() == pytest.approx(math.exp(15 / 6))
    assert "bits_per_byte" not in found, "nobody counted bytes"


def test_nothing_seen_says_nothing():
    meter = PerplexityMeter(legacy_divisor=True)
    meter.update(torch.zeros(0), 0)
    assert meter.compute() == {}
    meter.update(torch.tensor([-1.0]), 1)
    meter.reset()
    assert meter.compute() == {}
