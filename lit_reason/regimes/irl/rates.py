"""One optimizer for policy and reward, each with a rate of its own that runs through its steps of every round."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lit_reason.core.config import OptimConfig
from lit_reason.core.schedules import lr_factor, schedule_of
from lit_reason.optim.together import Together
from lit_reason.regimes.irl.config import RewardConfig, RoundConfig


def with_reward(
    policy: Optimizer, own: list[nn.Parameter], optim: OptimConfig, reward: RewardConfig, rounds: RoundConfig
) -> tuple[Optimizer, LambdaLR]:
    """Put the reward's weights beside the policy's.

    Args:
        policy: optimizer of all else.
        own: the reward's weights; none where the reward is the policy.
        optim: the policy's schedule.
        reward: the reward's rate and schedule.
        rounds: steps of each in a round.

    Returns:
        The optimizer, and a schedule that is stepped once an optimizer step of either.
    """
    _, of_reward = rates(optim, reward, rounds)
    shapes: list[Any] = [rates(schedule_of(group, optim), reward, rounds)[0] for group in policy.param_groups]
    if not own:
        return policy, LambdaLR(policy, shapes)
    beside = AdamW(own, lr=reward.lr, eps=1e-5, weight_decay=0.0, fused=True)
    both = Together(policy, beside)
    return both, LambdaLR(both, [*shapes, *[of_reward] * len(beside.param_groups)])


def rates(
    optim: OptimConfig, reward: RewardConfig, rounds: RoundConfig
) -> tuple[Callable[[int], float], Callable[[int], float]]:
    """Shares of the highest rates, the policy's and the reward's, at a step of the run.

    Args:
        optim: the policy's schedule; it spans the reward's steps where the reward is the policy.
        reward: the reward's.
        rounds: steps of each in a round.
    """
    length, implicit = rounds.reward_steps + rounds.policy_steps, reward.model == "policy"
    first, count = (0, rounds.reward_steps) if implicit else (rounds.reward_steps, rounds.policy_steps)
    shape = OptimConfig(schedule=reward.schedule, warmup=0.0, final_lr=0.0)

    def of_policy(step: int) -> float:
        return lr_factor(max(step % length - first, 0), count, optim)

    def of_reward(step: int) -> float:
        return lr_factor(step % length, rounds.reward_steps, shape)

    return of_policy, of_reward
