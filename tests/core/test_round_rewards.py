"""What a recipe adds to rewards: costs of length in closed form, divergence estimates against the divergence itself."""

import math

import pytest
import torch
from made_rollouts import rollout

from lit_reason.core.policy_config import PolicyConfig
from lit_reason.core.resampling import without_spread
from lit_reason.core.round_rewards import divergence, divergence_paid, length_paid
from lit_reason.errors import UserError

P, Q = [0.5, 0.3, 0.2], [0.2, 0.2, 0.6]  # a policy and a reference over three tokens
KL = sum(p * math.log(p / q) for p, q in zip(P, Q, strict=True))


@pytest.mark.parametrize(("tokens", "costs"), [(9, 0.0), (10, 0.0), (11, 0.5), (13, 1.5), (14, 2.0), (20, 2.0)])
def test_the_last_tokens_cost_linearly(tokens, costs):
    config = PolicyConfig(overlong_tokens=4, overlong_penalty=2.0)
    paid = length_paid(rollout([0.0], 3.0, tokens=tokens - 1, between=0), config, 14)
    assert paid.outcome_terms == {"o": 3.0, "overlong": pytest.approx(-costs)}


def test_a_rollout_that_was_cut_off_pays_for_it_and_no_other_does():
    config = PolicyConfig(truncated="penalise", overlong_penalty=0.5)
    assert length_paid(rollout([0.0], 1.0, finished=False), config, 99).outcome == 0.5
    assert length_paid(rollout([0.0], 1.0), config, 99).outcome == 1.0
    assert length_paid(rollout([0.0], 1.0, finished=False), PolicyConfig(truncated="mask"), 99).outcome == 1.0
    by_token = rollout([0.0], finished=False, token_rewards=[0.0, 1.0, 2.0, 0.0])
    assert length_paid(by_token, config, 99).token_rewards == [0.0, 1.0, 1.5, 0.0]


@pytest.mark.parametrize(("estimate", "wanted"), [("k1", KL), ("k3", KL)])
def test_unbiased_estimates_are_the_divergence_on_average(estimate, wanted):
    found = sum(
        p
        * float(
            divergence(rollout(tokens=1, logprob=[0, math.log(p), 0]), torch.tensor([0, math.log(q), 0]), estimate)[1]
        )
        for p, q in zip(P, Q, strict=True)
    )
    assert found == pytest.approx(wanted, rel=1e-6)


def test_the_gradient_of_k2_is_that_of_the_divergence_and_that_of_k1_is_nothing():
    """Why k1 may stand in a reward and not in the loss."""
    logits = torch.tensor(P).log().requires_grad_()
    log_p, log_q = logits.log_softmax(0), torch.tensor(Q).log()
    (true,) = torch.autograd.grad((log_p.exp() * (log_p - log_q)).sum(), logits, retain_graph=True)
    weight = torch.tensor(P)  # samples come from the policy; their weights carry no gradient
    (k2,) = torch.autograd.grad((weight * 0.5 * (log_q - log_p) ** 2).sum(), logits, retain_graph=True)
    (k1,) = torch.autograd.grad((weight * (log_p - log_q)).sum(), logits)
    torch.testing.assert_close(k2, true)
    torch.testing.assert_close(k1, torch.zeros(3), rtol=0, atol=1e-6)
    with pytest.raises(UserError, match="k1 has a gradient of 0"):
        PolicyConfig(kl=0.1, kl_estimate="k1")
    PolicyConfig(kl=0.1, kl_estimate="k1", kl_in="reward")


def test_each_turn_pays_for_its_own_tokens_and_for_none_of_the_environments():
    t = rollout([1.0, 2.0], 5.0)  # tokens: prompt, 2 of turn 0, 1 said, 2 of turn 1, 1 said
    kl_T = divergence(t, torch.tensor([9.0, -0.6, -0.7, 9.0, -0.4, -0.5, 9.0]), "k1")
    assert kl_T.tolist() == pytest.approx([0, 0.1, 0.2, 0, -0.1, 0, 0], abs=1e-6)
    paid = divergence_paid(t, kl_T, 10.0)
    assert paid.turn_rewards == pytest.approx([1 - 3, 2 + 1], abs=1e-5) and paid.outcome == 5.0
    by_token = rollout([0.0, 0.0], token_rewards=[0.0, 1.0, 0.0, 0.0, 0.0, 1.0, 0.0])
    assert divergence_paid(by_token, kl_T, 10.0).token_rewards == pytest.approx([0, 0, -2, 0, 1, 1, 0], abs=1e-5)


def test_a_group_without_spread_is_one_in_which_no_rule_could_find_a_difference():
    assert without_spread([rollout([1.0, 0.0], 1.0), rollout([1.0, 0.0], 1.0)])
    assert without_spread([rollout([1.0], 1.0), rollout([5.0], 1.0, failure="x")])
    assert not without_spread([rollout([1.0, 0.0], 1.0), rollout([0.0, 1.0], 1.0)])  # same return, paid elsewhere
    assert not without_spread([rollout([1.0], 0.0), rollout([1.0], 1.0)])


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"updates": 0}, "policy.updates is 0"),
        ({"resample": -1}, "policy.resample is -1"),
        ({"overlong_penalty": -1.0}, "policy.overlong_penalty is -1"),
        ({"importance_cap": 0.0}, "policy.importance_cap is 0"),
        ({"loss": "reinforce", "updates": 2}, "set policy.updates to 1"),
        ({"loss": "reinforce", "ratio": "turn"}, "policy.ratio turn needs ppo or cispo"),
    ],
)
def test_settings_that_cannot_work_are_refused(fields, says):
    with pytest.raises(UserError, match=says):
        PolicyConfig(**fields)
