"""Token-level credit: recursions against plain sums, and the places where tool tokens must not count."""

import pytest
import torch

from lit_reason.credit.tokens import bilevel_gae, gae, per_token, token_rewards, whitened
from lit_reason.errors import UserError

# prompt, turn 0 (3 tokens), tool result (2), turn 1 (2 tokens), tool result (1), turn 2 (1 token)
TURNS = torch.tensor([-1, 0, 0, 0, -1, -1, 1, 1, -1, 2])
SAMPLED = TURNS >= 0
generator = torch.Generator().manual_seed(0)
VALUE = torch.randn(10, generator=generator, dtype=torch.float64)
REWARD = token_rewards(torch.tensor([0.7, 0.0, 1.0], dtype=torch.float64), TURNS)


def test_a_turn_is_paid_at_its_last_token():
    assert REWARD.tolist() == [0, 0, 0, 0.7, 0, 0, 0, 0, 0, 1.0]


def test_a_reward_without_tokens_is_refused_and_an_empty_turn_without_reward_is_not():
    turns = torch.tensor([0, 2])
    with pytest.raises(UserError, match="turn 1 is due a reward of 0.5"):
        token_rewards(torch.tensor([1.0, 0.5, 1.0]), turns)
    assert token_rewards(torch.tensor([1.0, 0.0, 2.0]), turns).tolist() == [1.0, 2.0]


def test_every_sampled_token_gets_its_turn_and_no_other():
    found = per_token(torch.tensor([1.0, 2.0, 3.0]), TURNS)
    assert found.tolist() == [0, 1, 1, 1, 0, 0, 2, 2, 0, 3]


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.9, 0.8), (0.5, 0.0)])
def test_gae_is_its_defining_sum(gamma, lam):
    r, v = REWARD[SAMPLED], VALUE[SAMPLED]
    n = len(r)
    delta = [float(r[t] + gamma * (v[t + 1] if t + 1 < n else 0.0) - v[t]) for t in range(n)]
    wanted = [sum((gamma * lam) ** (s - t) * delta[s] for s in range(t, n)) for t in range(n)]
    found = gae(REWARD, VALUE, TURNS, gamma=gamma, lam=lam)
    torch.testing.assert_close(found[SAMPLED], torch.tensor(wanted, dtype=torch.float64))
    assert (found[~SAMPLED] == 0).all()


def test_with_both_factors_one_gae_is_return_minus_value():
    returns = torch.tensor([1.7, 1.7, 1.7, 1.0, 1.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(gae(REWARD, VALUE, TURNS)[SAMPLED], returns - VALUE[SAMPLED])


@pytest.mark.parametrize("rule", [gae, bilevel_gae])
def test_more_tool_tokens_change_nothing(rule):
    """Returns run across what the environment wrote (the bug of verl#7278 stopped there)."""
    longer = torch.tensor([-1, 0, 0, 0, -1, -1, -1, -1, 1, 1, -1, -1, 2])
    value, reward = torch.full((13,), torch.nan, dtype=torch.float64), torch.zeros(13, dtype=torch.float64)
    value[longer >= 0], reward[longer >= 0] = VALUE[SAMPLED], REWARD[SAMPLED]
    found = rule(reward, value, longer, gamma=0.9, lam=0.7)
    torch.testing.assert_close(found[longer >= 0], rule(REWARD, VALUE, TURNS, gamma=0.9, lam=0.7)[SAMPLED])


def test_bilevel_equals_gae_where_all_factors_are_one():
    torch.testing.assert_close(bilevel_gae(REWARD, VALUE, TURNS), gae(REWARD, VALUE, TURNS))


def test_bilevel_by_hand():
    g, lam, G, L = 0.9, 0.8, 0.7, 0.6
    found = bilevel_gae(REWARD, VALUE, TURNS, gamma=g, lam=lam, turn_gamma=G, turn_lam=L)
    v = VALUE
    last2 = 1.0 - v[9]
    last1 = 0.0 + G * v[9] - v[7] + G * L * last2
    last0 = 0.7 + G * v[7] - v[3] + G * L * last1
    assert found[9] == pytest.approx(float(last2))
    assert found[7] == pytest.approx(float(last1))
    assert found[3] == pytest.approx(float(last0))
    assert found[6] == pytest.approx(float(g * v[7] - v[6] + g * lam * last1))
    assert found[2] == pytest.approx(float(g * v[3] - v[2] + g * lam * last0))


def test_a_turn_that_earned_nothing_is_still_a_turn():
    """Boundaries come from who sampled, never from where a reward is not zero."""
    assert REWARD[7] == 0
    changed = bilevel_gae(REWARD, VALUE, TURNS, turn_gamma=0.5)
    merged = torch.where(TURNS == 1, 0, TURNS)  # what one sees who takes turn 1 for a part of turn 0
    assert not torch.allclose(changed[SAMPLED], bilevel_gae(REWARD, VALUE, merged, turn_gamma=0.5)[SAMPLED])


def test_batch_whitening_counts_sampled_tokens_alone():
    returns = [torch.tensor([9.0, 1.0, 2.0]), torch.tensor([3.0, 9.0])]
    turns = [torch.tensor([-1, 0, 0]), torch.tensor([0, -1])]
    first, second = whitened(returns, turns, eps=0.0)
    assert first.tolist() == [0.0, -1.0, 0.0] and second.tolist() == [1.0, 0.0]


def test_whitening_takes_in_what_other_processes_hold():
    own, others = torch.tensor([1.0, 2.0]), torch.tensor([5.0, 8.0])
    (found,) = whitened([own], [torch.tensor([0, 0])], everyones=lambda held: [held, others], eps=0.0)
    everyone = torch.cat([own, others])
    torch.testing.assert_close(found, (own - everyone.mean()) / everyone.std())
