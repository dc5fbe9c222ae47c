"""Surprise of a continuation is that of its own tokens, given its prompt, under the model as it is."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_steering import lm

from lit_reason.steering.trial import Generated, continuation_nll, perplexity


def test_the_surprise_of_a_continuation_is_that_of_its_tokens():
    model = lm()
    pairs = [([5, 9], [13, 2, 30]), ([7], [21]), ([8, 1, 3], [4, 4])]
    for (prompt, rest), found in zip(pairs, continuation_nll(model, pairs, batch=2), strict=True):
        with torch.no_grad():
            logp = model.hf(input_ids=torch.tensor([[*prompt, *rest]])).logits[0].log_softmax(-1)
        wanted = -sum(float(logp[len(prompt) + i - 1, token]) for i, token in enumerate(rest))
        assert found == pytest.approx(wanted, rel=1e-4)


def test_perplexity_counts_tokens_and_not_texts():
    texts = [Generated(0, 0, "", 3 * math.log(2), 3), Generated(0, 1, "", math.log(8), 1)]
    assert perplexity(texts) == pytest.approx(2 ** (6 / 4))
    assert math.isnan(perplexity([]))
