"""Rollouts as packs to train on: every sampled token with its advantage and the log-probability it was sampled with.

Shape letters: T tokens of a rollout, S sampled tokens of a pack.
"""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Sequence
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
        ref_logp: `float32 [S]` log-probability under the reference, or None where there is none.
        value: `float32 [S]` the critic's value when the round was played, or None where there is no critic.
        target_value: `float32 [S]` the value it should have given.
    """

    advantage: Tensor
    old_logp: Tensor
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
    loads = [(0, part) for part in range(parts)]
    chosen: list[list[Credited]] = [[] for _ in range(parts)]
    for rollout in sorted(rollouts, key=lambda r: -len(r.trajectory.ids)):
        load, part = heapq.heappop(loads)
        chosen[part].append(rollout)
        heapq.heappush(loads, (load + len(rollout.trajectory.ids), part))
    shortest = min(rollouts, key=lambda r: len(r.trajectory.ids))
    return [_pack(own or [dataclasses.replace(shortest, weight=0.0)], norm) for own in chosen]


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
    fields = {f.name: getattr(pack, f.name) for f in dataclasses.fields(Pack)}
    return PolicyPack(
        **fields,
        advantage=advantage[sampled],
        old_logp=old_logp[sampled],
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
        truncated: `mask` leaves rollouts that a limit cut off out of the loss, `keep` does not.

    Returns:
        A weight for each rollout, and the sum that the weighted loss is to be divided by, before it is added up over
        processes. Rollouts whose environment failed, or that sampled nothing, have weight 0 and do not count.
    """
    trained = [t.sampled > 0 and not t.failure and (truncated == "keep" or t.finished) for t in trajectories]
    pairs = list(zip(trajectories, trained, strict=True))
    n = float(sum(trained))
    if by == "sequence":
        return [1.0 / t.sampled if on else 0.0 for t, on in pairs], n
    tokens = float(sum(t.sampled for t, on in pairs if on))
    return [float(on) for on in trained], tokens if by == "token" else n * longest
