"""Shapley values of a game: enumerated, from orders in antithetic pairs, by Kernel SHAP; and Owen values.

A `worth` maps coalitions `bool [N, P]` to `float64 [N]`. Shape letters: N coalitions, P players, M orders.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from math import comb

import torch
from torch import Generator, Tensor

from lit_reason.errors import UserError

Worth = Callable[[Tensor], Tensor]
MOST_EXACT = 12
MOST_DRAWS = 4  # draws for every coalition that is wanted, of which some come again


def exact(worth: Worth, P: int) -> Tensor:
    """Shapley values by enumeration (Shapley 1953): `2^P` evaluations.

    Args:
        worth: of coalitions.
        P: number of players, at most `MOST_EXACT`.

    Returns:
        `float64 [P]`; they sum to the worth of all less the worth of nobody.

    Raises:
        UserError: too many players.
    """
    if P > MOST_EXACT:
        raise UserError(f"exact Shapley values of {P} players take 2^{P} evaluations; the most is {MOST_EXACT} players")
    value = worth(_all_coalitions(P))
    size = _all_coalitions(P).sum(1)
    weight = torch.tensor([1.0 / (P * comb(P - 1, s)) for s in range(P)], dtype=torch.float64)
    number = torch.arange(2**P)
    found = torch.zeros(P, dtype=torch.float64)
    for i in range(P):
        without = number[(number >> i) % 2 == 0]
        found[i] = (weight[size[without]] * (value[without + (1 << i)] - value[without])).sum()
    return found


def _all_coalitions(P: int) -> Tensor:
    """Every coalition, by its number: player i is there where bit i is set."""
    return (torch.arange(2**P)[:, None] >> torch.arange(P)) % 2 == 1


def permutation(worth: Worth, P: int, evaluations: int, generator: Generator, block_P: Tensor | None = None) -> Tensor:
    """Shapley values from random orders, each followed by its reverse (antithetic; arXiv 2104.12199).

    The marginal contributions of an order sum to the worth of all less that of nobody, so their mean does, too.

    Args:
        worth: of coalitions.
        P: number of players.
        evaluations: about how many coalitions to evaluate; at least one pair of orders is.
        generator: draws the orders.
        block_P: blocks of players that enter one after the other: the values are then Owen's (1977).

    Returns:
        `float64 [P]`.
    """
    if P == 0:
        return torch.zeros(0, dtype=torch.float64)
    pairs = max(1, evaluations // (2 * max(P - 1, 1)))
    order_MP = _orders(P, pairs, generator, block_P)
    order_MP = torch.cat([order_MP, order_MP.flip(1)])
    rank_MP = order_MP.argsort(1)
    present = rank_MP[:, None, :] < torch.arange(P + 1)[None, :, None]  # [M, P + 1, P]: the first so many players
    value = worth(present.reshape(-1, P)).view(-1, P + 1)
    return torch.zeros_like(rank_MP, dtype=torch.float64).scatter(1, order_MP, value.diff(dim=1)).mean(0)


def _orders(P: int, count: int, generator: Generator, block_P: Tensor | None) -> Tensor:
    """Random orders `[count, P]`; with blocks, those in which each block stands together."""
    within = torch.rand((count, P), generator=generator, dtype=torch.float64)
    if block_P is None:
        return within.argsort(1)
    blocks = int(block_P.max()) + 1
    place = torch.rand((count, blocks), generator=generator, dtype=torch.float64).argsort(1).argsort(1)
    return (place[:, block_P] + within).argsort(1)


def kernel(worth: Worth, P: int, evaluations: int, generator: Generator) -> Tensor:
    """Kernel SHAP (arXiv 1705.07874, theorem 2), coalitions in pairs with their complements (arXiv 2012.01536).

    Sizes whose coalitions would each be drawn at least once are taken whole, from the smallest and the largest inwards,
    so that draws are left for the sizes between. The sum of the values is held to the worth of all less that of nobody.

    Args:
        worth: of coalitions.
        P: number of players.
        evaluations: about how many coalitions to evaluate.
        generator: draws them.

    Returns:
        `float64 [P]`.
    """
    ends = worth(torch.stack([torch.zeros(P, dtype=torch.bool), torch.ones(P, dtype=torch.bool)]))
    gain = ends[1] - ends[0]
    if P < 2:
        return gain.expand(P).clone()
    coalition_NP, weight_N = _by_size(P, evaluations, generator)
    z_NP = coalition_NP.double()
    gram = z_NP.T @ (weight_N[:, None] * z_NP)
    aim = z_NP.T @ (weight_N * (worth(coalition_NP) - ends[0]))
    inverse = torch.linalg.pinv(gram, hermitian=True)
    free, slope = inverse @ aim, inverse @ torch.ones(P, dtype=torch.float64)
    found = free + slope * (gain - free.sum()) / slope.sum()
    return found + (gain - found.sum()) / P  # what rounding left over


def _by_size(P: int, evaluations: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Coalitions and their weights in the regression: whole sizes first, then draws of the sizes that are left."""
    mass = {s: (P - 1) / (s * (P - s)) for s in range(1, P)}  # of all coalitions of a size, by the Shapley kernel
    rows: list[Tensor] = []
    weights: list[Tensor] = []
    left = evaluations
    for s in range(1, P // 2 + 1):
        sizes = {s, P - s}
        count, own = comb(P, s) * len(sizes), sum(mass[size] for size in sizes)
        if left * own < count * sum(mass.values()):
            break
        members = torch.tensor(list(combinations(range(P), s)))
        of_size = torch.zeros((len(members), P), dtype=torch.bool).scatter(1, members, True)
        rows.append(torch.cat([of_size, ~of_size]) if len(sizes) == 2 else of_size)
        weights.append(torch.full((count,), own / count, dtype=torch.float64))
        left -= count
        for size in sizes:
            del mass[size]
    if mass:
        drawn, times = _drawn(P, mass, max(1, left // 2), generator)
        rows += [drawn, ~drawn]
        weights += [times * (sum(mass.values()) / (2 * times.sum()))] * 2
    return torch.cat(rows), torch.cat(weights)


def _drawn(P: int, mass: dict[int, float], pairs: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Different coalitions with sizes drawn by their mass, and how often each came before there were enough."""
    sizes = torch.tensor(list(mass))
    chances = torch.tensor(list(mass.values()), dtype=torch.float64)
    size_N = sizes[torch.multinomial(chances, MOST_DRAWS * pairs, replacement=True, generator=generator)]
    rank_NP = torch.rand((len(size_N), P), generator=generator, dtype=torch.float64).argsort(1).argsort(1)
    found: dict[bytes, list[int]] = {}
    for i, row in enumerate((rank_NP < size_N[:, None]).numpy()):
        found.setdefault(row.tobytes(), []).append(i)
        if len(found) == pairs:
            break
    first = torch.tensor([at[0] for at in found.values()])
    return rank_NP[first] < size_N[first, None], torch.tensor([len(at) for at in found.values()]).double()
