"""Rollouts as packs to train on: every sampled token with its advantage and the log-probability it was sampled with.

Shape letters: T tokens of a rollout, S sampled tokens of a pack.
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_reason.data.packing import Pack, pack_rows
from lit_reason.rollout.trajectory import Trajectory


@dataclass(kw_only=True)
class PolicyPack(Pack):
    """A pack whose trained tokens were sampled by the policy.

    Attributes:
        advantage: `float32 [S]` advantage of each sampled token.
        old_logp: `float32 [S]` log-probability with which it was sampled.
        turn: `int64 [S]` number of the turn it belongs to, each turn of the pack having its own.
        rollout: `int64 [S]` number of its rollout in the pack.
        start_logp: `float32 [S]` log-probability by the trainer's own pass when the round was played, or None where
            that of the sampler is taken for it.
        ref_logp: `float32 [S]` log-probability under the reference, or None where there is none.
        value: `float32 [S]` the critic's value when the round was played, or None where there is no critic.
        target_value: `float32 [S]` the value it should have given.
    """

    advantage: Tensor
    old_logp: Tensor
    turn: Tensor
    rollout: Tensor
    start_logp: Tensor | None = None
    ref_logp: Tensor | None = None
    value: Tensor | None = None
    target_value: Tensor | None = None


@dataclass(frozen=True)
class Credited:
    """A rollout and what its tokens are worth.

    Attributes:
        trajectory: the rollout.
        advantage_T: advantage of each token, 0 where none was sampled.
        value_T: the critic's value of the state each token was sampled in, or None where there is no critic.
        target_value_T: the value it should have given.
        weight: loss weight of each of its sampled tokens; 0 leaves the rollout out of the loss.
    """

    trajectory: Trajectory
    advantage_T: Tensor
    value_T: Tensor | None = None
    target_value_T: Tensor | None = None
    weight: float = 1.0


def policy_packs(rollouts: Sequence[Credited], parts: int, norm: float) -> list[PolicyPack]:
    """Deal rollouts out to micro-batches of about equal size.

    Args:
        rollouts: at least one.
        parts: number of packs.
        norm: divisor of the loss of all packs together, over all processes.

    Returns:
        `parts` packs; one that got no rollout holds the shortest, untrained, so that every process runs alike.
    """
    lengths = [len(r.trajectory.ids) for r in rollouts]
    dealt = [[rollouts[i] for i in members] for members in deal(lengths, parts)]
    shortest = dataclasses.replace(rollouts[lengths.index(min(lengths))], weight=0.0)
    return [_pack(own or [shortest], norm) for own in dealt]


def deal(lengths: Sequence[int], parts: int) -> list[list[int]]:
    """Which rollouts go into which part, so that parts hold about as many tokens: the longest first, to the emptiest.

    Args:
        lengths: tokens of each.
        parts: number of parts.
    """
    loads = [(0, part) for part in range(parts)]
    dealt: list[list[int]] = [[] for _ in range(parts)]
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        load, part = heapq.heappop(loads)
        dealt[part].append(i)
        heapq.heappush(loads, (load + lengths[i], part))
    return dealt


def over_rollouts(rollouts: Sequence[Trajectory], parts: int, score: Callable[[Pack], Tensor]) -> list[Tensor]:
    """One number for each token of each rollout, computed in packs.

    Args:
        rollouts: at least one.
        parts: number of packs; every process makes as many, so that passes over sharded weights stay in step.
        score: gives `[T]` for a pack of T tokens.

    Returns:
        `[T]` for each rollout, in order, on the CPU.
    """
    lengths = [len(t.ids) for t in rollouts]
    found: dict[int, Tensor] = {}
    for members in deal(lengths, parts):
        chosen = members or [lengths.index(min(lengths))]
        pack = pack_rows([rollouts[i].token_row() for i in chosen], 1.0)
        found |= zip(chosen, score(pack).cpu().split(pack.lengths), strict=True)
    return [found[i] for i in range(len(rollouts))]


def _pack(rollouts: Sequence[Credited], norm: float) -> PolicyPack:
    rows = []
    for rollout in rollouts:
        row = rollout.trajectory.token_row()
        rows.append(dataclasses.replace(row, weight=row.weight * rollout.weight))
    pack = pack_rows(rows, norm)
    sampled = pack.index + 1

    def chosen(numbers: Sequence[Tensor | None]) -> Tensor | None:
        given = [n for n in numbers if n is not None]
        return torch.cat(given).float()[sampled] if given else None

    old_logp = torch.tensor([p for rollout in rollouts for p in rollout.trajectory.logprob])
    advantage = torch.cat([r.advantage_T for r in rollouts]).float()
    number = torch.repeat_interleave(torch.arange(len(rollouts)), torch.tensor(pack.lengths))
    turns = torch.tensor([0, *itertools.accumulate(len(r.trajectory.stops) for r in rollouts)])
    turn = torch.tensor([k for r in rollouts for k in r.trajectory.turn_id]) + turns[number]
    fields = {f.name: getattr(pack, f.name) for f in dataclasses.fields(Pack)}
    return PolicyPack(
        **fields,
        advantage=advantage[sampled],
        old_logp=old_logp[sampled],
        turn=turn[sampled],
        rollout=number[sampled],
        value=chosen([r.value_T for r in rollouts]),
        target_value=chosen([r.target_value_T for r in rollouts]),
    )


def loss_weights(
    trajectories: Sequence[Trajectory], by: str, *, longest: int, truncated: str
) -> tuple[list[float], float]:
    """How much each token of each rollout weighs, and this process's part of the divisor.

    Args:
        trajectories: all rollouts of this process.
        by: `token` weighs all tokens of the batch alike (DAPO, arXiv 2503.14476, equation 8); `sequence` all rollouts
            alike (GRPO, arXiv 2402.03300, equation 3); `constant` divides by the most tokens there could be (Dr. GRPO,
            arXiv 2503.20783).
        longest: that number of tokens, for one rollout.
        truncated: `mask` leaves rollouts that a limit cut off out of the loss; anything else does not.

    Returns:
        A weight for each rollout, and the sum that the weighted loss is to be divided by, before it is added up over
        processes. Rollouts whose environment failed, or that sampled nothing, have weight 0 and do not count.
    """
    trained = [t.sampled > 0 and not t.failure and (truncated != "mask" or t.finished) for t in trajectories]
    pairs = list(zip(trajectories, trained, strict=True))
    n = float(sum(trained))
    if by == "sequence":
        return [1.0 / t.sampled if on else 0.0 for t, on in pairs], n
    tokens = float(sum(t.sampled for t, on in pairs if on))
    return [float(on) for on in trained], tokens if by == "token" else n * longest
