"""Rewards of a group of rollouts, turn by turn, in the form that every credit rule reads.

Shape letters: G rollouts of one prompt, K turns of the longest of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lit_reason.errors import UserError


@dataclass(frozen=True)
class GroupRewards:
    """What G rollouts of one prompt earned.

    A rollout that stopped earlier than others has absorbed: its rewards after its last turn are exactly 0, and
    they count as such wherever rollouts are compared turn by turn.

    Attributes:
        turn_GK: reward of each turn, `float64 [G, K]`.
        outcome_G: reward of the whole rollout, `float64 [G]`; it falls due at the last turn.
        turns_G: number of turns each rollout took, `int64 [G]`, at least 1.
    """

    turn_GK: Tensor
    outcome_G: Tensor
    turns_G: Tensor

    @classmethod
    def of(cls, turns: Sequence[Sequence[float]], outcomes: Sequence[float]) -> GroupRewards:
        """Rewards from plain lists.

        Args:
            turns: for each rollout the rewards of its turns, first to last; at least one turn.
            outcomes: the outcome of each rollout.

        Returns:
            The same numbers as tensors, zeros after each rollout's last turn.

        Raises:
            UserError: there is no rollout, lengths differ, a rollout has no turn, or a reward is not finite.
        """
        if not turns or len(turns) != len(outcomes):
            raise UserError(f"rewards of {len(turns)} rollouts and {len(outcomes)} outcomes: one of each is needed")
        empty = [i for i, row in enumerate(turns) if not row]
        if empty:
            raise UserError(f"rollout {empty[0]} of its group has no turn: leave it out before credit is assigned")
        K = max(len(row) for row in turns)
        turn_GK = torch.tensor([[*row, *[0.0] * (K - len(row))] for row in turns], dtype=torch.float64)
        outcome_G = torch.tensor(outcomes, dtype=torch.float64)
        if not (turn_GK.isfinite().all() and outcome_G.isfinite().all()):
            raise UserError(f"a reward is not finite: turns {turn_GK.tolist()}, outcomes {outcome_G.tolist()}")
        return cls(turn_GK, outcome_G, torch.tensor([len(row) for row in turns]))

    @property
    def alive_GK(self) -> Tensor:
        """Whether a rollout took a turn, `bool [G, K]`."""
        return torch.arange(self.turn_GK.shape[1]) < self.turns_G[:, None]

    @property
    def due_GK(self) -> Tensor:
        """All rewards where they fall due, `float64 [G, K]`: those of turns, and the outcome at the last turn."""
        return self.turn_GK.scatter_add(1, self.turns_G[:, None] - 1, self.outcome_G[:, None])

    @property
    def total_G(self) -> Tensor:
        """Undiscounted return of each rollout, `float64 [G]`."""
        return self.turn_GK.sum(1) + self.outcome_G

    def flattened(self) -> GroupRewards:
        """The same content, all of it due at the end: turn rewards become part of the outcome."""
        return replace(self, turn_GK=torch.zeros_like(self.turn_GK), outcome_G=self.total_G)


def to_go(reward_GK: Tensor, gamma: float = 1.0) -> Tensor:
    """Discounted sum of the rewards from each turn (or token) on.

    Args:
        reward_GK: rewards in the order of time, last dimension; zeros after the end.
        gamma: discount a step, in [0, 1].

    Returns:
        `Q_k = sum_{l >= k} gamma^(l - k) r_l`, of the same shape.
    """
    total = torch.zeros_like(reward_GK)
    later = torch.zeros_like(reward_GK[..., 0])
    for k in reversed(range(reward_GK.shape[-1])):
        later = reward_GK[..., k] + gamma * later
        total[..., k] = later
    return total
