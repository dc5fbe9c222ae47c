"""Rewards paid token by token reach the advantages of the group rules and of the critic, in closed form."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from lit_reason.core.actor_critic import paid
from lit_reason.core.group_credit import by_group
from lit_reason.credit.group import RULES, CreditConfig
from lit_reason.credit.tokens import gae
from lit_reason.metrics.means import Means
from lit_reason.rollout.trajectory import NOT_SAMPLED, Trajectory, read_ledger, write_ledger


def rollout(token_rewards, prompt=0, **others):
    """A prompt token, then one sampled token a reward; a None is a token of the environment."""
    turn_id = [NOT_SAMPLED, *(NOT_SAMPLED if r is None else 0 for r in token_rewards)]
    fields = dict(
        prompt=prompt, rollout=0, ids=list(range(len(turn_id))), turn_id=turn_id, logprob=[0.0] * len(turn_id),
        turn_terms=[{"r": 9.0}], outcome_terms={"o": 9.0}, stops=["end"], finished=True, policy_version=0, row_id="x",
        token_rewards=[0.0, *(r or 0.0 for r in token_rewards)],
    )  # fmt: skip
    return Trajectory(**{**fields, **others})


def advantages(rollouts, rule="turn_rtg", **settings):
    meter = Means(("dead_groups",))
    found = by_group(rollouts, RULES[rule], CreditConfig(rule, **{"scale": "none", **settings}), meter)
    return [c.advantage_T.tolist() for c in found], meter.compute()["dead_groups"]


def test_each_token_gets_its_reward_to_go_against_that_of_the_others_from_the_same_token_on():
    first, second = rollout([1.0, 0.5, None, 0.25]), rollout([0.0, 2.0])
    found, dead = advantages([first, second])
    assert found[0] == [0, 1.75 - 2.0, 0.75 - 2.0, 0, 0.25 - 0.0]  # the other has stopped, and counts with 0
    assert found[1] == [0, 2.0 - 1.75, 2.0 - 0.75]
    assert dead == 0


def test_the_return_goes_to_every_token_under_a_rule_that_pays_at_the_end():
    found, _ = advantages([rollout([1.0, 0.5, 0.25]), rollout([0.0, 1.0])], "rloo")
    assert found == [[0, 0.75, 0.75, 0.75], [0, -0.75, -0.75]]


def test_token_rewards_stand_in_place_of_turn_rewards_and_outcome():
    same = [rollout([0.5, 0.5]), rollout([0.5, 0.5], turn_terms=[{"r": -50.0}])]
    found, dead = advantages(same)
    assert dead == 1 and found == [[0, 0, 0], [0, 0, 0]]


def test_one_number_scales_a_group():
    plain, _ = advantages([rollout([1.0, 0.5]), rollout([0.0, 0.25])])
    scaled, _ = advantages([rollout([1.0, 0.5]), rollout([0.0, 0.25])], scale="group", eps=0.0)
    deviation = torch.tensor([1.5, 0.25]).std().item()
    torch.testing.assert_close(torch.tensor(scaled) * deviation, torch.tensor(plain))


def test_a_failed_rollout_and_one_without_tokens_are_borne():
    empty, failed = rollout([]), rollout([5.0], failure="gone")
    found, _ = advantages([rollout([1.0]), empty, failed])
    assert found == [[0, 1.0], [0], [0, 0]]


@pytest.mark.parametrize("lam", [1.0, 0.5])
def test_a_critic_sees_the_reward_of_each_token_where_it_is_paid(lam):
    t = rollout([1.0, 0.5, None, 0.25])
    value_T = torch.tensor([0.0, 0.1, 0.2, 0.0, 0.3], dtype=torch.float64)
    reward_T = paid(t, at_end=False)
    assert reward_T.tolist() == [0, 1.0, 0.5, 0, 0.25]
    found = gae(reward_T, value_T, torch.tensor(t.turn_id), lam=lam)
    last = 0.25 - 0.3
    second = 0.5 + 0.3 - 0.2 + lam * last
    assert found.tolist() == pytest.approx([0, 1.0 + 0.2 - 0.1 + lam * second, second, 0, last])


def test_the_control_pays_all_token_rewards_at_the_last_sampled_token():
    assert paid(rollout([1.0, 0.5, None, 0.25, None]), at_end=True).tolist() == [0, 0, 0, 0, 1.75, 0]


def test_token_rewards_survive_the_ledger(tmp_path):
    given = [rollout([1.0, 0.5]), dataclasses.replace(rollout([0.1]), token_rewards=[])]
    write_ledger(tmp_path / "rollouts.jsonl", given)
    assert list(read_ledger(tmp_path / "rollouts.jsonl")) == given


def test_a_rollout_that_sampled_nothing_is_no_ones_baseline():
    with_it, _ = advantages([rollout([1.0]), rollout([3.0]), rollout([])])
    without, _ = advantages([rollout([1.0]), rollout([3.0])])
    assert with_it[:2] == without and with_it[2] == [0]
