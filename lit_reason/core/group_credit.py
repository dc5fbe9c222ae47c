"""Credit of a round's rollouts by comparison within their groups, turn by turn or token by token."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lit_reason.core.ranks import from_all_ranks
from lit_reason.credit.group import CreditConfig
from lit_reason.credit.rewards import GroupRewards
from lit_reason.credit.tokens import per_token, whitened
from lit_reason.metrics.means import Means
from lit_reason.rollout.policy_pack import Credited
from lit_reason.rollout.trajectory import NOT_SAMPLED, Trajectory

Rule = Callable[[GroupRewards, CreditConfig], Tensor]


def by_group(rollouts: Sequence[Trajectory], rule: Rule, config: CreditConfig, meter: Means) -> list[Credited]:
    """The advantage of each token: that of its step by a rule, in the group of its prompt.

    A step is a turn; where rewards are paid token by token, it is a token, and the same rules hold: `turn_rtg` gives
    every token the reward-to-go of its own against that of the others from the same token on.

    Args:
        rollouts: all of a round on this process; those that failed or sampled nothing are in no group.
        rule: from rewards of a group to advantages.
        config: settings of the rule.
        meter: takes the share of groups that teach nothing, as `dead_groups`.

    Returns:
        One entry a rollout, in order.
    """
    found = [Credited(t, torch.zeros(len(t.ids), dtype=torch.float64)) for t in rollouts]
    groups = defaultdict(list)
    for i, t in enumerate(rollouts):
        if not t.failure and t.sampled:
            groups[t.prompt].append(i)
    for members in groups.values():
        steps = [_steps(rollouts[i]) for i in members]
        rewards = GroupRewards.of([paid for paid, _, _ in steps], [outcome for _, outcome, _ in steps])
        advantage_GK = rule(rewards, config)
        meter.update("dead_groups", [not advantage_GK.any()])
        for i, advantage_K, (_, _, step_T) in zip(members, advantage_GK, steps, strict=True):
            found[i] = Credited(rollouts[i], per_token(advantage_K, torch.tensor(step_T)))
    return over_batch(found) if config.scale == "batch" else found


def over_batch(credited: Sequence[Credited]) -> list[Credited]:
    """Advantages with mean 0 and deviation 1 over the sampled tokens of all sound rollouts, on all processes.

    Args:
        credited: all of a round on this process; those that failed stay as they are.
    """
    sound = [i for i, c in enumerate(credited) if not c.trajectory.failure]
    turn_ids = [torch.tensor(credited[i].trajectory.turn_id) for i in sound]
    scaled = whitened([credited[i].advantage_T for i in sound], turn_ids, everyones=from_all_ranks)
    found = list(credited)
    for i, advantage_T in zip(sound, scaled, strict=True):
        found[i] = dataclasses.replace(found[i], advantage_T=advantage_T)
    return found


def _steps(t: Trajectory) -> tuple[list[float], float, list[int]]:
    """Reward of each step, outcome, and the step that each token belongs to."""
    if not t.token_rewards:
        return t.turn_rewards, t.outcome, t.turn_id
    at = [i for i, turn in enumerate(t.turn_id) if turn != NOT_SAMPLED]
    step_T = [NOT_SAMPLED] * len(t.ids)
    for step, i in enumerate(at):
        step_T[i] = step
    return [t.token_rewards[i] for i in at] or [0.0], 0.0, step_T
