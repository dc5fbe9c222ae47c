"""Named means over everything since the last time, over all processes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric


class Means(Metric):
    """Weighted means of named quantities.

    Args:
        names: of the quantities; fixed, so that all processes add up the same.
    """

    full_state_update = False
    sums: Tensor
    counts: Tensor

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.names = tuple(names)
        self.add_state("sums", torch.zeros(len(self.names), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("counts", torch.zeros(len(self.names), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, name: str, values: Tensor | Sequence[float], weight: float | None = None) -> None:
        """Add values of one quantity.

        Args:
            name: one of `names`.
            values: numbers, of any count.
            weight: what the sum of the values is to be divided by; default: how many they are.
        """
        at = self.names.index(name)
        values = torch.as_tensor(values, dtype=torch.float64, device=self.sums.device).detach()
        self.sums[at] += values.sum()
        self.counts[at] += values.numel() if weight is None else weight

    def compute(self) -> dict[str, Tensor]:
        """The mean of each quantity that has any value."""
        pairs = zip(self.names, self.sums, self.counts, strict=True)
        return {name: (total / count).float() for name, total, count in pairs if count > 0}
