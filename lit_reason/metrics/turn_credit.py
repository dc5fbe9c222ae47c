"""How the credit of rollouts lies over their turns: how much it varies there, and where the gradient comes from.

Shape letters: T tokens of a rollout, K turns.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric


class TurnCredit(Metric):
    """Variance of the advantage, and share of the gradient, by turn.

    The gradient is that of a policy loss at the logits, before any update moves the ratio from 1. For a token of
    probability p with weight w and advantage A it is `-w A (onehot - p)`, whose absolute values sum to exactly
    `2 |w A| (1 - p)`: what a turn's tokens have of the sum over all tokens is its share.

    Args:
        turns: number of turns told apart; later ones count with the last.
    """

    full_state_update = False
    count_K: Tensor
    sum_K: Tensor
    square_K: Tensor
    pull_K: Tensor

    def __init__(self, turns: int) -> None:
        super().__init__()
        for name in ("count_K", "sum_K", "square_K", "pull_K"):
            self.add_state(name, torch.zeros(turns, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, advantage_T: Tensor, turn_id_T: Tensor, logprob_T: Tensor, weight: float) -> None:
        """Add a rollout.

        Args:
            advantage_T: advantage of each token.
            turn_id_T: `int64 [T]` turn that sampled each token, negative where none did.
            logprob_T: log-probability of each sampled token.
            weight: loss weight of each sampled token; a rollout of weight 0 is left out.
        """
        if weight == 0:
            return
        pull_T = weight * advantage_T.abs() * (1 - logprob_T.exp())
        for k in turn_id_T.unique().tolist():
            if k >= 0:
                at, own = min(k, len(self.count_K) - 1), turn_id_T == k
                mean = advantage_T[own].double().mean().to(self.sum_K.device)
                self.count_K[at] += 1
                self.sum_K[at] += mean
                self.square_K[at] += mean**2
                self.pull_K[at] += pull_T[own].double().sum().to(self.pull_K.device)

    def compute(self) -> dict[str, Tensor]:
        """By turn, from 1: variance over rollouts of its tokens' mean advantage, and share of the gradient."""
        found = {}
        for k, (count, total, square) in enumerate(zip(self.count_K, self.sum_K, self.square_K, strict=True), 1):
            if count > 1:
                found[f"variance_turn_{k}"] = ((square - total**2 / count) / (count - 1)).clamp(min=0).float()
            if count > 0 and self.pull_K.sum() > 0:
                found[f"gradient_turn_{k}"] = (self.pull_K[k - 1] / self.pull_K.sum()).float()
        return found
