"""Explaining responses: seeds, cache, parts of the responses, and the rewards that are hard to explain."""

from __future__ import annotations

import time
import warnings

import pytest
import torch

from lit_reason.rewards.attribution.attributor import Attributor
from lit_reason.rewards.attribution.config import AttributionConfig
from lit_reason.rewards.planted import PlantedReward
from lit_reason.rewards.sequence_reward import SequenceReward

PROMPT, RESPONSE = [1, 2], [5, 9, 4, 7, 11, 3]


class Function(SequenceReward):
    """A reward from a plain function, which counts what it is asked."""

    def __init__(self, function, version="f"):
        self.function, self.version, self.asked = function, version, 0

    def __call__(self, ids_NL, seen_NL):
        self.asked += len(ids_NL)
        return self.function(ids_NL, seen_NL)


def shap(**settings):
    return Attributor(["final", "shap"], AttributionConfig(**settings))


@pytest.mark.parametrize("masking", ["pad", "token"])
def test_planted_token_worths_are_found(masking):
    reward = PlantedReward(32, skip=2)
    reward.token_V[0] = 0.0  # the stand-in is worth nothing
    found = Attributor(
        ["shap", "lime", "owen", "prefix"], AttributionConfig(masking=masking, fill_id=0, lime_ridge=1e-9)
    )
    credit_KT = found.explain(reward, PROMPT, RESPONSE).credit_KT
    for row in credit_KT:
        torch.testing.assert_close(row, reward.token_V[RESPONSE], rtol=0, atol=1e-5)


def test_the_worth_of_the_fully_masked_response_goes_to_the_last_token():
    reward = PlantedReward(32)  # the prompt counts, and masking leaves it there
    found = shap().explain(reward, PROMPT, RESPONSE)
    base = float(reward.token_V[PROMPT].sum())
    assert found.base == pytest.approx(base)
    expected = reward.token_V[RESPONSE].clone()
    expected[-1] += base
    torch.testing.assert_close(found.credit_KT[1], expected, rtol=0, atol=1e-9)


def test_equal_responses_get_equal_credit_from_the_cache_or_anew():
    reward = PlantedReward(64, pairs=1.0)
    long = list(range(3, 33))
    first = shap(evaluations=40)
    a = first.explain(reward, PROMPT, long)
    first.explain(reward, PROMPT, long[1:])
    again = first.explain(reward, PROMPT, long)
    assert a.calls > 0 and again.cached and again.calls == 0
    fresh = shap(evaluations=40, cache=0).explain(reward, PROMPT, long)
    assert torch.equal(a.credit_KT, again.credit_KT) and torch.equal(a.credit_KT, fresh.credit_KT)
    other_seed = Attributor(["final", "shap"], AttributionConfig(evaluations=40), seed=1).explain(reward, PROMPT, long)
    assert not torch.equal(a.credit_KT, other_seed.credit_KT)


def test_the_cache_forgets_an_earlier_reward_and_the_longest_unused():
    reward, attributor = PlantedReward(32), shap(cache=2)
    attributor.explain(reward, PROMPT, [5, 6])
    reward.version = "trained on"
    assert not attributor.explain(reward, PROMPT, [5, 6]).cached
    attributor.explain(reward, PROMPT, [7, 8])
    attributor.explain(reward, PROMPT, [8, 8])
    assert not attributor.explain(reward, PROMPT, [5, 6]).cached


def test_a_part_of_the_responses_is_attributed():
    reward, attributor = PlantedReward(512, seed=3), shap(fraction=0.3, otherwise="uniform")
    calls = []
    for i in range(200):
        found = attributor.explain(reward, PROMPT, [i, i + 1, i + 2])
        calls.append(found.calls > 2)
        if not calls[-1]:
            torch.testing.assert_close(found.credit_KT[1], torch.full((3,), found.reward / 3).double())
    assert 0.15 < sum(calls) / 200 < 0.45
    assert sum(shap(fraction=0.0).explain(reward, PROMPT, [i, 4, 5]).base is not None for i in range(20)) == 0


def test_spans_save_calls():
    reward, response = PlantedReward(64, pairs=1.0), list(range(3, 27))
    by_token = shap().explain(reward, PROMPT, response)
    by_span = shap(players="span", span_tokens=4).explain(reward, PROMPT, response)
    assert by_span.calls < by_token.calls / 3


# ---- hard rewards ----


def test_a_reward_that_is_not_deterministic_is_warned_of_and_averaged():
    noise = torch.Generator().manual_seed(0)
    reward = Function(lambda ids, seen: seen[:, 2:].sum(1) + 0.1 * torch.randn(len(ids), generator=noise))
    attributor = shap(repeats=16)
    with pytest.warns(UserWarning, match="not deterministic.*attribution.repeats=16"):
        found = attributor.explain(reward, PROMPT, RESPONSE)
    assert float(found.credit_KT[1].sum()) == pytest.approx(found.reward)
    assert found.credit_KT[1, :-1].tolist() == pytest.approx([1.0] * 5, abs=0.15)  # one draw would be off by 0.1 each
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attributor.explain(reward, PROMPT, RESPONSE[1:])


def test_a_deterministic_reward_is_not_asked_twice_for_long():
    reward, attributor = Function(lambda ids, seen: seen.sum(1).double()), Attributor(["final"], AttributionConfig())
    calls = [attributor.explain(reward, PROMPT, [i, 3]).calls for i in range(10)]
    assert calls == [2] * 8 + [1] * 2


def test_a_constant_reward_is_paid_at_the_end():
    reward = Function(lambda ids, seen: torch.full((len(ids),), 2.0))
    for name in ("shap", "lime", "prefix", "owen"):
        credit = Attributor([name], AttributionConfig()).explain(reward, PROMPT, RESPONSE).credit_KT[0]
        torch.testing.assert_close(credit, torch.tensor([0, 0, 0, 0, 0, 2.0]).double(), rtol=0, atol=1e-9)


def test_responses_of_one_token_and_of_none():
    reward = PlantedReward(32)
    attributor = Attributor(["final", "uniform", "shap", "lime", "prefix", "owen"], AttributionConfig(), always=(3,))
    for response in ([7], [3]):
        found = attributor.explain(reward, PROMPT, response)
        assert found.credit_KT[:, 0].tolist() == pytest.approx([found.reward] * 6)
    assert attributor.explain(reward, PROMPT, []).credit_KT.shape == (6, 0)


def test_an_explainer_that_times_out_pays_the_reward_at_the_end_and_says_so():
    def slow(ids, seen):
        time.sleep(0.03)
        return seen.sum(1).double()

    attributor = shap(timeout_s=0.05, batch=4)
    found = attributor.explain(Function(slow), PROMPT, RESPONSE)
    assert found.timed_out and found.reward == 8
    assert found.credit_KT.tolist() == [[0, 0, 0, 0, 0, 8]] * 2
    assert not attributor.explain(Function(slow), PROMPT, RESPONSE).cached  # it may be less busy next time
