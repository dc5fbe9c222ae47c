"""Which estimators are unbiased where the policy decides when to stop: against the gradient found by enumeration.

After each turn a rollout goes on with probability `P` (one logit for all turns), up to `MOST` turns. Every further turn
pays `PAY`, and the outcome depends on the number of turns. All rollouts can be listed, so the gradient of the expected
return with respect to the logit is exact, and the expectation of any group estimator is a sum over all groups.
"""

import itertools

import pytest
import torch

from lit_reason.credit.group import RULES, CreditConfig
from lit_reason.credit.rewards import GroupRewards

P, PAY, MOST = 0.5, 1.0, 3
OUTCOME = {1: 0.0, 2: 0.3, 3: -0.2}
PLAIN = CreditConfig(scale="none")


def rollouts():
    """Every rollout: (probability, turn rewards, outcome, d log-probability / d logit of each turn's choice)."""
    for turns in range(1, MOST + 1):
        went_on = turns - 1
        stopped = turns < MOST
        probability = P**went_on * ((1 - P) if stopped else 1.0)
        scores = [1 - P] * went_on + ([-P] if stopped else [0.0])  # of going on and of stopping; no choice at the last
        yield probability, [0.0] + [PAY] * went_on, OUTCOME[turns], scores


def expected_return(p):
    """In closed form, for the derivative."""
    chance = [1 - p, p * (1 - p), p * p]
    return sum(c * (PAY * k + OUTCOME[k + 1]) for k, c in enumerate(chance))


def true_gradient():
    step = 1e-6
    by_p = (expected_return(P + step) - expected_return(P - step)) / (2 * step)
    return by_p * P * (1 - P)


def estimate(rule, G=2):
    """Expectation of `sum_k A_ik * score_ik`, averaged over the group, over every group of G rollouts."""
    total = 0.0
    for group in itertools.product(list(rollouts()), repeat=G):
        chance = torch.tensor([r[0] for r in group]).prod().item()
        rewards = GroupRewards.of([r[1] for r in group], [r[2] for r in group])
        advantage = rule(rewards)
        total += chance * sum(
            float(advantage[i, k]) * score for i, r in enumerate(group) for k, score in enumerate(r[3])
        )
    return total / G


def by_survivors(rewards):
    """The naive extension: each turn's reward against the mean of those rollouts that reached the turn."""
    alive = rewards.alive_GK
    mean = (rewards.due_GK * alive).sum(0) / alive.sum(0).clamp(min=1)
    return (rewards.due_GK - mean) * alive


@pytest.mark.parametrize("G", [2, 3])
@pytest.mark.parametrize("name", ["turn_rtg", "rloo", "flat_content"])
def test_unbiased_rules_have_the_true_gradient(name, G):
    found = estimate(lambda rewards: RULES[name](rewards, PLAIN), G)
    assert found == pytest.approx(true_gradient(), abs=1e-8)


@pytest.mark.parametrize("name", ["turn_rtg", "flat_content"])
def test_a_discount_of_one_is_the_return_itself(name):
    kept = estimate(lambda rewards: RULES[name](rewards, CreditConfig(scale="none", gamma=1.0)))
    assert kept == pytest.approx(true_gradient(), abs=1e-8)


def test_own_sample_in_the_baseline_shrinks_the_gradient_by_one_rollout_in_G():
    config = CreditConfig(scale="none", leave_one_out=False)
    found = estimate(lambda rewards: RULES["turn_rtg"](rewards, config), 2)
    assert found == pytest.approx(true_gradient() * (2 - 1) / 2, abs=1e-8)


def test_comparing_survivors_alone_is_biased():
    """The known defect of per-turn baselines (verl#7244): it hides the gain of taking another turn."""
    assert abs(estimate(by_survivors) - true_gradient()) > 0.1


def test_separate_normalisation_by_turn_ignores_what_a_turn_enables():
    assert abs(estimate(lambda rewards: RULES["mt_grpo_k"](rewards, PLAIN)) - true_gradient()) > 0.1
