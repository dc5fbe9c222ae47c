"""Named means over everything since the last time, over all processes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torchmetrics import Metric


class Means(Metric):
    """Weighted means of named quantities.

    Args:
        names: of the quantities, the same on all processes.
    """

    full_state_update = False
    sums: Tensor
    counts: Tensor

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.names = self.fixed = tuple(names)
        self.add_state("sums", torch.zeros(len(self.names), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("counts", torch.zeros(len(self.names), dtype=torch.float64), dist_reduce_fx="sum")

    def also(self, names: Iterable[str], like: str) -> None:
        """Make room for quantities that turn up on the way. Before `compute` all processes must have the same.

        Args:
            names: of the quantities; those there are stay.
            like: quantity that has been counted whenever these were to be, so that their values until now were 0.
        """
        found = (*self.fixed, *sorted({*self.names, *names} - set(self.fixed)))
        if found == self.names:
            return
        at = {name: i for i, name in enumerate(self.names)}
        nothing = self.sums.new_zeros(())
        self.sums = torch.stack([self.sums[at[n]] if n in at else nothing for n in found])
        self.counts = torch.stack([self.counts[at.get(n, at[like])] for n in found])
        self._defaults |= {"sums": torch.zeros(len(found), dtype=torch.float64)}
        self._defaults |= {"counts": torch.zeros(len(found), dtype=torch.float64)}
        self.names = found

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
