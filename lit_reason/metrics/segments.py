"""Loss, entropy and accuracy by segment of the trace and by decile of the thought. S: trained tokens."""

from __future__ import annotations

import torch
from torchmetrics import Metric

from lit_reason.data.token_row import SEGMENT_NAMES

DECILES = 10


class SegmentMeter(Metric):
    """Means per trained token since the last reset, over all ranks.

    Loss weights enter `loss` alone: every other figure is a plain mean, so that runs with different weights compare.
    """

    full_state_update = False
    count: torch.Tensor
    nll: torch.Tensor
    entropy: torch.Tensor
    hits: torch.Tensor
    in_decile: torch.Tensor
    decile_nll: torch.Tensor
    decile_entropy: torch.Tensor
    decile_hits: torch.Tensor
    weighted_nll: torch.Tensor
    weight: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        n = len(SEGMENT_NAMES)
        for name in ("count", "nll", "entropy", "hits"):
            self.add_state(name, torch.zeros(n, dtype=torch.float64), dist_reduce_fx="sum")
        for name in ("in_decile", "decile_nll", "decile_entropy", "decile_hits"):
            self.add_state(name, torch.zeros(DECILES, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("weighted_nll", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("weight", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(
        self,
        logp: torch.Tensor,
        entropy: torch.Tensor,
        hit: torch.Tensor,
        weight: torch.Tensor,
        segment: torch.Tensor,
        decile: torch.Tensor,
    ) -> None:
        """Add trained tokens.

        Args:
            logp: `[S]` log-probability of each target.
            entropy: `[S]` entropy of each prediction, in nats.
            hit: `[S]` whether the target was the most likely token.
            weight: `[S]` loss weights.
            segment: `[S]` values of `Segment`.
            decile: `[S]` 0..9, or -1 outside thoughts.
        """
        segment, nll = segment.long(), -logp.detach().double()
        self.count.index_add_(0, segment, torch.ones_like(nll))
        self.nll.index_add_(0, segment, nll)
        self.entropy.index_add_(0, segment, entropy.detach().double())
        self.hits.index_add_(0, segment, hit.double())
        thought = (decile >= 0).double()  # outside thoughts: adds 0 to decile 0, without a boolean index
        where = decile.clamp(min=0).long()
        self.in_decile.index_add_(0, where, thought)
        self.decile_nll.index_add_(0, where, nll * thought)
        self.decile_entropy.index_add_(0, where, entropy.detach().double() * thought)
        self.decile_hits.index_add_(0, where, hit.double() * thought)
        self.weighted_nll += (nll * weight).sum()
        self.weight += weight.sum()

    def compute(self) -> dict[str, torch.Tensor]:
        """`loss`, `entropy`, `accuracy`, each also as `<name>_<segment>` and `<name>_decile_<d>`; NaN-free."""
        total = self.count.sum()
        out = {
            "loss": self.weighted_nll / self.weight,
            "entropy": self.entropy.sum() / total,
            "accuracy": self.hits.sum() / total,
        }
        counts = self.count.tolist()
        for s, name in enumerate(SEGMENT_NAMES):
            if counts[s]:
                out[f"loss_{name}"] = self.nll[s] / self.count[s]
                out[f"entropy_{name}"] = self.entropy[s] / self.count[s]
                out[f"accuracy_{name}"] = self.hits[s] / self.count[s]
        for d, count in enumerate(self.in_decile.tolist()):
            if count:
                out[f"loss_decile_{d}"] = self.decile_nll[d] / self.in_decile[d]
                out[f"entropy_decile_{d}"] = self.decile_entropy[d] / self.in_decile[d]
                out[f"accuracy_decile_{d}"] = self.decile_hits[d] / self.in_decile[d]
        return {name: value.float() for name, value in out.items()} if total > 0 else {}
