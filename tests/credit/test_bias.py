"""Which estimators are unbiased where the policy decides when to stop: against the gradient found by enumeration."""

import pytest

from benchmarks.credit_bias import (
    GO_ON,
    PAY,
    by_critic,
    by_rule,
    by_survivors,
    estimators,
    exact_value,
    expectation,
    guess,
    outcome,
    rollouts,
    true_gradient,
)
from lit_reason.credit.group import RULES, CreditConfig
from lit_reason.credit.tokens import bilevel_gae, gae

MOST = 3
TRUE = true_gradient(MOST)
UNBIASED = ("turn_rtg", "rloo", "flat_content", "reinforce_pp")
BY_SIZE = ("traj_mr",)  # its own rollout is in the baseline, which shrinks it to (G - 1) / G
OTHER = ("traj_or", "mt_grpo", "mt_grpo_k")  # of another goal, or biased on purpose: see below


def test_the_true_gradient_is_the_derivative_of_the_expected_return():
    def expected(p):
        chance = [1 - p, p * (1 - p), p * p]
        return sum(c * (PAY * k + outcome(k + 1)) for k, c in enumerate(chance))

    by_p = (expected(GO_ON + 1e-6) - expected(GO_ON - 1e-6)) / 2e-6
    assert pytest.approx(by_p * GO_ON * (1 - GO_ON), abs=1e-8) == TRUE
    assert sum(r.chance for r in rollouts(MOST)) == 1


def test_every_rule_has_its_verdict():
    assert {*UNBIASED, *BY_SIZE, *OTHER} == set(RULES)
    assert {name.split(",")[0] for name, _ in estimators(2)} >= {*RULES, "gae", "bilevel_gae"}


@pytest.mark.parametrize("G", [2, 3])
@pytest.mark.parametrize("name", UNBIASED)
def test_unbiased_rules_have_the_true_gradient(name, G):
    assert expectation(by_rule(name), MOST, G) == pytest.approx(TRUE, abs=1e-9)


@pytest.mark.parametrize("G", [2, 3])
@pytest.mark.parametrize("name", BY_SIZE)
def test_own_sample_in_the_baseline_shrinks_the_gradient_by_one_rollout_in_G(name, G):
    assert expectation(by_rule(name), MOST, G) == pytest.approx(TRUE * (G - 1) / G, abs=1e-9)
    own_too = CreditConfig(scale="none", leave_one_out=False)
    assert expectation(by_rule("turn_rtg", own_too), MOST, G) == pytest.approx(TRUE * (G - 1) / G, abs=1e-9)


def test_the_outcome_rule_follows_the_outcome_alone():
    wanted = true_gradient(MOST, outcome_only=True) / 2
    assert expectation(by_rule("traj_or"), MOST) == pytest.approx(wanted, abs=1e-9)
    assert abs(wanted - TRUE / 2) > 0.1


def test_the_two_turn_rule_credits_the_first_turn_alone_with_turn_rewards():
    """Its expectation: the outcome's gradient, and that of the turn rewards by the first turn's decision."""
    by_first = sum(r.chance * r.scores[0] * sum(r.turns) for r in rollouts(MOST))
    wanted = (true_gradient(MOST, outcome_only=True) + by_first) / 2
    assert expectation(by_rule("mt_grpo"), MOST) == pytest.approx(wanted, abs=1e-9)
    assert abs(wanted - TRUE / 2) > 0.05
    both = (true_gradient(2, outcome_only=True) + sum(r.chance * r.scores[0] * sum(r.turns) for r in rollouts(2))) / 2
    assert both == pytest.approx(true_gradient(2) / 2)  # with two turns nothing is lost: there is no later choice


def test_separate_normalisation_by_turn_ignores_what_a_turn_enables():
    own = sum(r.chance * sum(s * paid for s, paid in zip(r.scores, r.turns, strict=True)) for r in rollouts(MOST))
    wanted = (true_gradient(MOST, outcome_only=True) + own) / 2
    found = expectation(by_rule("mt_grpo_k"), MOST)
    assert abs(found - TRUE / 2) > 0.1
    assert found < TRUE / 2 and abs(found - wanted) < abs(found - TRUE / 2)


def test_comparing_survivors_alone_is_biased():
    """The known defect of per-turn baselines (verl#7244): it hides the gain of taking another turn."""
    assert expectation(by_survivors, MOST) < TRUE - 0.1


@pytest.mark.parametrize("rule", [gae, bilevel_gae])
def test_a_critic_may_be_wrong_under_whole_returns_and_must_be_right_without(rule):
    assert expectation(by_critic(rule, guess, 1.0), MOST, 1) == pytest.approx(TRUE, abs=1e-9)
    assert expectation(by_critic(rule, exact_value(MOST), 0.0), MOST, 1) == pytest.approx(TRUE, abs=1e-9)
    assert abs(expectation(by_critic(rule, guess, 0.0), MOST, 1) - TRUE) > 0.05


def test_the_simplest_case_by_hand():
    """Stop with probability 1 - p or take one more turn that pays c: the gradient is p (1 - p) c."""
    plain = true_gradient(2) - true_gradient(2, outcome_only=True)
    assert plain == pytest.approx(GO_ON * (1 - GO_ON) * PAY)
