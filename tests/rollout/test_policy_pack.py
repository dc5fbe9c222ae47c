"""Rollouts dealt to micro-batches: weights and divisors against the papers' formulas, nothing lost or doubled."""

import pytest
import torch

from lit_reason.rollout.policy_pack import Credited, loss_weights, policy_packs
from lit_reason.rollout.trajectory import NOT_SAMPLED, Trajectory


def rollout(number, turn_id, *, finished=True, failure=""):
    T = len(turn_id)
    return Trajectory(
        prompt=0,
        rollout=number,
        ids=[10 * number + t for t in range(T)],
        turn_id=turn_id,
        logprob=[-0.1 * (t + 1) if k != NOT_SAMPLED else 0.0 for t, k in enumerate(turn_id)],
        turn_terms=[{} for _ in range(max(turn_id) + 1)],
        outcome_terms={},
        stops=["end"] * (max(turn_id) + 1),
        finished=finished,
        policy_version=0,
        row_id="r",
        failure=failure,
    )


N = NOT_SAMPLED
ROLLOUTS = [rollout(0, [N, 0, 0, N, 1]), rollout(1, [N, N, 0]), rollout(2, [N, 0, 0, 0, 0, N, 1, 1])]


@pytest.mark.parametrize(
    ("by", "weights", "norm"),
    [("token", [1, 1, 1], 3 + 1 + 6), ("sequence", [1 / 3, 1, 1 / 6], 3), ("constant", [1, 1, 1], 3 * 50)],
)
def test_whose_mean_the_loss_is(by, weights, norm):
    found, divisor = loss_weights(ROLLOUTS, by, longest=50, truncated="keep")
    assert found == pytest.approx(weights) and divisor == norm


@pytest.mark.parametrize("by", ["token", "sequence", "constant"])
def test_failed_empty_and_masked_rollouts_do_not_count(by):
    odd = [rollout(3, [N, 0], failure="x"), rollout(4, [N, N]), rollout(5, [N, 0, 0], finished=False)]
    plain = loss_weights(ROLLOUTS, by, longest=50, truncated="mask")
    weights, norm = loss_weights([*ROLLOUTS, *odd], by, longest=50, truncated="mask")
    assert weights == [*plain[0], 0.0, 0.0, 0.0] and norm == plain[1]
    assert loss_weights([*ROLLOUTS, odd[2]], by, longest=50, truncated="keep")[0][-1] > 0


def credited(weights=(1.0, 1.0, 1.0)):
    return [
        Credited(t, torch.arange(len(t.ids), dtype=torch.float64) + 100 * t.rollout, weight=w)
        for t, w in zip(ROLLOUTS, weights, strict=True)
    ]


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_every_sampled_token_is_in_one_pack_with_its_own_numbers(parts):
    packs = policy_packs(credited((0.5, 1.0, 2.0)), parts, norm=7.0)
    assert len(packs) == parts and {p.norm for p in packs} == {7.0}
    found = {}
    for pack in packs:
        for target, weight, advantage, old in zip(
            pack.targets.tolist(),
            pack.target_weight.tolist(),
            pack.advantage.tolist(),
            pack.old_logp.tolist(),
            strict=True,
        ):
            assert target not in found
            found[target] = (weight, advantage, pytest.approx(old))
    wanted = {
        10 * t.rollout + i: (w, 100.0 * t.rollout + i, t.logprob[i])
        for t, w in zip(ROLLOUTS, (0.5, 1.0, 2.0), strict=True)
        for i, k in enumerate(t.turn_id)
        if k != N
    }
    assert found == wanted


def test_a_part_without_rollouts_holds_an_untrained_one():
    packs = policy_packs(credited(), 5, norm=1.0)
    assert len(packs) == 5
    assert sum(p.index.numel() for p in packs) == 10
    assert min(p.ids.numel() for p in packs) == 3


def test_loads_are_even():
    loads = sorted(p.ids.numel() for p in policy_packs(credited(), 2, norm=1.0))
    assert loads == [8, 8]


def test_a_rollout_of_weight_zero_is_seen_but_not_trained():
    (pack,) = policy_packs(credited((1.0, 0.0, 1.0)), 1, norm=1.0)
    assert pack.ids.numel() == 16 and 12 not in pack.targets.tolist()


def test_numbers_on_tokens_that_were_not_sampled_never_reach_the_loss():
    blank = [torch.tensor([float("nan") if k == N else 1.0 for k in t.turn_id]) for t in ROLLOUTS]
    rollouts = [Credited(t, b, value_T=2 * b) for t, b in zip(ROLLOUTS, blank, strict=True)]
    (pack,) = policy_packs(rollouts, 1, norm=1.0)
    assert pack.advantage.tolist() == [1.0] * 10 and pack.value.tolist() == [2.0] * 10
