"""Small games for the tests of attributions: a worth is a function of `bool [N, P]`."""

from __future__ import annotations

import torch
from torch import Tensor


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Interactions:
    """Single worths, pairs and triples of neighbours, and a base: nothing about it is additive.

    Args:
        P: number of players.
        seed: of the worths.
        pairs: size of the interactions of two.
        triples: size of the interactions of three.
        base: worth of nobody.
    """

    def __init__(self, P: int, seed: int = 0, pairs: float = 1.0, triples: float = 1.0, base: float = 0.7) -> None:
        g = generator(seed)
        self.P, self.base, self.calls = P, base, 0
        self.single = torch.randn(P, generator=g, dtype=torch.float64)
        self.pair = pairs * torch.randn(max(P - 1, 0), generator=g, dtype=torch.float64)
        self.triple = triples * torch.randn(max(P - 2, 0), generator=g, dtype=torch.float64)

    def __call__(self, present_NP: Tensor) -> Tensor:
        self.calls += len(present_NP)
        z = present_NP.double()
        value = self.base + z @ self.single
        value = value + (z[:, :-1] * z[:, 1:]) @ self.pair
        return value + (z[:, :-2] * z[:, 1:-1] * z[:, 2:]) @ self.triple

    def gain(self) -> float:
        ends = self(torch.tensor([[False] * self.P, [True] * self.P]))
        return float(ends[1] - ends[0])
