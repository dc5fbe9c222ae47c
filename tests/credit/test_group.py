"""Credit rules: against numbers worked out by hand, invariants, and gradients found by enumeration."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lit_reason.credit.group import RULES, CreditConfig
from lit_reason.credit.rewards import GroupRewards, to_go
from lit_reason.errors import UserError

PLAIN = CreditConfig(scale="none")
TWO = GroupRewards.of([[0.5, 0.0], [0.1, 0.3], [0.2]], [1.0, 0.0, 0.5])

number = st.floats(-3, 3, allow_nan=False, width=32)
groups = st.lists(st.tuples(st.lists(number, min_size=1, max_size=5), number), min_size=1, max_size=6).map(
    lambda rows: GroupRewards.of([r for r, _ in rows], [o for _, o in rows])
)


def close(found, wanted):
    torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float64), rtol=1e-12, atol=1e-12)


def test_rewards_after_the_end_are_zero_and_the_outcome_falls_due_at_the_last_turn():
    close(TWO.turn_GK, [[0.5, 0.0], [0.1, 0.3], [0.2, 0.0]])
    close(TWO.due_GK, [[0.5, 1.0], [0.1, 0.3], [0.7, 0.0]])
    assert TWO.alive_GK.tolist() == [[True, True], [True, True], [True, False]]
    close(TWO.total_G, [1.5, 0.4, 0.7])
    close(TWO.flattened().due_GK, [[0.0, 1.5], [0.0, 0.4], [0.7, 0.0]])


def test_returns_to_go():
    close(to_go(torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64), 0.5), [3.0, 4.0, 4.0])
    close(to_go(torch.tensor([[1.0, 2.0], [0.0, 3.0]], dtype=torch.float64)), [[3.0, 2.0], [3.0, 3.0]])


def test_outcome_rule_by_hand():
    close(RULES["traj_or"](TWO, PLAIN), [[0.5, 0.5], [-0.5, -0.5], [0.0, 0.0]])
    scaled = RULES["traj_or"](TWO, CreditConfig(eps=0.5))
    close(scaled, [[0.5, 0.5], [-0.5, -0.5], [0.0, 0.0]])  # deviation 0.5 and eps 0.5 make 1


def test_merged_rule_by_hand():
    mean = (1.5 + 0.4 + 0.7) / 3
    close(RULES["traj_mr"](TWO, PLAIN), [[1.5 - mean] * 2, [0.4 - mean] * 2, [0.7 - mean, 0.0]])


def test_two_turn_rule_by_hand():
    found = RULES["mt_grpo"](TWO, CreditConfig(scale="none", turn_coef=2.0, outcome_coef=3.0))
    turn = [0.5 - 1.1 / 3, 0.4 - 1.1 / 3, 0.2 - 1.1 / 3]
    first = [2 * t + 3 * o for t, o in zip(turn, [0.5, -0.5, 0.0], strict=True)]
    close(found, [[first[0], 0.5], [first[1], -0.5], [first[2], 0.0]])


def test_k_turn_rule_counts_stopped_rollouts_with_zero():
    found = RULES["mt_grpo_k"](TWO, PLAIN)
    first, second = [0.5 - 0.8 / 3, 0.1 - 0.8 / 3, 0.2 - 0.8 / 3], [-0.1, 0.2]
    close(found, [[first[0] + 0.5, second[0] + 0.5], [first[1] - 0.5, second[1] - 0.5], [first[2], 0.0]])


def test_return_to_go_leaves_its_own_rollout_out():
    # returns from turn 1: 1.5, 0.4, 0.7; from turn 2: 1.0, 0.3 and 0 for the one that had stopped
    wanted = [[1.5 - 0.55, 1.0 - 0.15], [0.4 - 1.1, 0.3 - 0.5], [0.7 - 0.95, 0.0]]
    close(RULES["turn_rtg"](TWO, PLAIN), wanted)
    own_too = CreditConfig(scale="none", leave_one_out=False)
    close(RULES["turn_rtg"](TWO, own_too)[:, 0], [1.5 - 2.6 / 3, 0.4 - 2.6 / 3, 0.7 - 2.6 / 3])


def test_one_number_scales_the_whole_group():
    plain, scaled = RULES["turn_rtg"](TWO, PLAIN), RULES["turn_rtg"](TWO, CreditConfig())
    std = torch.tensor([1.5, 0.4, 0.7], dtype=torch.float64).std()
    torch.testing.assert_close(scaled, plain / (std + 1e-4))


def test_equal_totals_earned_on_different_turns_are_not_divided_by_eps():
    rewards = GroupRewards.of([[1.0, 0.0], [0.0, 1.0]], [0.0, 0.0])
    found = RULES["turn_rtg"](rewards, CreditConfig())
    # From turn 0 on both earn 1; from turn 1 on 0 and 1, whose deviation is 1 / sqrt 2.
    expected = torch.tensor([[0.0, -1.0], [0.0, 1.0]], dtype=torch.float64) / (0.5**0.5 + 1e-4)
    torch.testing.assert_close(found, expected)


def test_flat_content_is_blind_to_the_turn_that_was_rewarded():
    early = GroupRewards.of([[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]], [0.0, 0.5])
    late = GroupRewards.of([[0.0, 0.0, 1.0], [0.0, 0.0, 0.0]], [0.0, 0.5])
    flat = RULES["flat_content"]
    assert torch.equal(flat(early, PLAIN), flat(late, PLAIN))
    assert not torch.equal(RULES["turn_rtg"](early, PLAIN), RULES["turn_rtg"](late, PLAIN))


def test_rloo_by_hand():
    close(RULES["rloo"](TWO, PLAIN), [[0.95, 0.95], [-0.7, -0.7], [-0.25, 0.0]])


@given(groups)
def test_nothing_after_the_end_and_a_lone_rollout_has_no_group(rewards):
    for name, rule in RULES.items():
        for scale in ("none", "group"):
            found = rule(rewards, CreditConfig(scale=scale))
            assert found.shape == rewards.turn_GK.shape and found.dtype == torch.float64, name
            assert found.isfinite().all() and (found[~rewards.alive_GK] == 0).all(), name
    if len(rewards.outcome_G) == 1:
        for name in ("traj_or", "traj_mr", "mt_grpo", "mt_grpo_k"):
            assert (RULES[name](rewards, PLAIN) == 0).all(), name  # its own mean is all there is
        close(RULES["rloo"](rewards, PLAIN)[0, 0], rewards.total_G[0].item())


@given(groups, st.randoms())
def test_the_order_of_rollouts_does_not_matter(rewards, random):
    order = list(range(len(rewards.outcome_G)))
    random.shuffle(order)
    shuffled = GroupRewards(rewards.turn_GK[order], rewards.outcome_G[order], rewards.turns_G[order])
    for rule in RULES.values():
        torch.testing.assert_close(rule(shuffled, PLAIN), rule(rewards, PLAIN)[order], rtol=1e-9, atol=1e-9)


@given(groups, number)
def test_a_constant_on_every_outcome_changes_nothing_where_the_group_is_the_baseline(rewards, constant):
    moved = GroupRewards(rewards.turn_GK, rewards.outcome_G + constant, rewards.turns_G)
    for name in ("traj_or", "traj_mr", "mt_grpo", "mt_grpo_k"):
        torch.testing.assert_close(RULES[name](moved, PLAIN), RULES[name](rewards, PLAIN), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("turns", "outcomes", "says"),
    [
        ([], [], "0 rollouts"),
        ([[1.0]], [1.0, 2.0], "1 rollouts and 2 outcomes"),
        ([[1.0], []], [1.0, 2.0], "rollout 1 .* no turn"),
        ([[1.0], [float("nan")]], [1.0, 2.0], "not finite"),
        ([[1.0]], [float("inf")], "not finite"),
    ],
)
def test_rewards_that_cannot_be_used_are_refused(turns, outcomes, says):
    with pytest.raises(UserError, match=says):
        GroupRewards.of(turns, outcomes)


@pytest.mark.parametrize("name", ["traj_mr", "traj_or", "rloo", "turn_rtg", "flat_content"])
def test_a_rollout_counts_once_however_many_turns_it_took(name):
    """Samples of single turns, thrown into one group, would let long rollouts set the baseline."""
    short = GroupRewards.of([[1.0], [0.5], [0.25]], [0.0, 1.0, 0.0])
    longer = GroupRewards.of([[1.0], [0.0, 0.0, 0.0, 0.5], [0.25]], [0.0, 1.0, 0.0])
    for i in (0, 2):
        torch.testing.assert_close(RULES[name](longer, PLAIN)[i, 0], RULES[name](short, PLAIN)[i, 0])


def test_a_group_of_one_and_a_group_without_spread_give_numbers():
    for name in RULES:
        config = CreditConfig(scale="group")
        for rewards in (GroupRewards.of([[0.3, 0.1]], [1.0]), GroupRewards.of([[0.3]] * 4, [1.0] * 4)):
            assert RULES[name](rewards, config).isfinite().all(), name
