"""Which thoughts stay: the (tau, rho) family and its siblings as pure index arithmetic.

Each strategy is an *order* in which the thoughts of a trace are taken; keeping k thoughts means the first k
of that order, put back into their original sequence. So the selections of one strategy are nested (more is
always a superset), and counting thoughts, counting tokens and fitting to a length differ in how k is found
and in nothing else.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from fractions import Fraction
from functools import lru_cache

BY_THOUGHT: tuple[str, ...] = ("epic", "head", "tail", "middle", "random")
_DENOMINATOR = 1_000_000  # tau and rho are read as decimals of at most this precision


@lru_cache(maxsize=1024)
def exact(share: float | Fraction) -> Fraction:
    """The fraction a float was written for, so that 0.1 * 10 is 1 and 0.29 * 100 is 29.

    Args:
        share: tau or rho.
    """
    return share if isinstance(share, Fraction) else Fraction(share).limit_denominator(_DENOMINATOR)


def edge_strategy(strategy: str, rho: float) -> str:
    """The strategy by its edges: `epic` at rho = 0 is `head`, at rho = 1 it is `tail`.

    Args:
        strategy: one of `BY_THOUGHT`.
        rho: share of the kept thoughts taken from the end.
    """
    if strategy != "epic" or 0 < rho < 1:
        return strategy
    return "tail" if rho else "head"


def least_kept(strategy: str, protect: int = 0) -> int:
    """The smallest number of thoughts a strategy leaves, k_min: 2 where there are two edges, else 1.

    Args:
        strategy: as from `edge_strategy`.
        protect: thoughts at the end that always stay; the strategy's own first thought stays beside them.
    """
    return max(2 if strategy == "epic" else 1, protect + (strategy != "tail" and protect > 0))


def kept_count(total: int, tau: float | Fraction, least: int = 1) -> int:
    """Number of thoughts kept, `k = clamp(ceil(tau n), k_min, n)`.

    The rounding was not found in any source; it is this project's.

    Args:
        total: n, thoughts in the trace.
        tau: condensation ratio in (0, 1].
        least: k_min.
    """
    return min(max(math.ceil(exact(tau) * total), least), total)


def edge_counts(kept: int, rho: float) -> tuple[int, int]:
    """Thoughts from the head and from the tail, `t = floor(rho k)`, `h = k - t`: an odd thought goes to the
    head.

    At rho = 0.5 and k >= 2 both are at least 1.

    Args:
        kept: k.
        rho: share taken from the end, in [0, 1].

    Returns:
        `(h, t)` with `h + t == k`.
    """
    tail = math.floor(exact(rho) * kept)
    return kept - tail, tail


def taking_order(total: int, strategy: str, *, rho: float = 0.5, seed: int = 0, row_id: str = "") -> list[int]:
    """The order in which a strategy takes the thoughts of a trace.

    Args:
        total: n, thoughts in the trace.
        strategy: one of `BY_THOUGHT`.
        rho: for `epic`, the share of the taken thoughts that comes from the end, at every k.
        seed: for `random`.
        row_id: for `random`: the draw depends on (seed, row id) alone.

    Returns:
        A permutation of `range(total)`.
    """
    if strategy == "epic":
        order = list(_edges_order(total, rho))
    elif strategy == "head":
        order = list(range(total))
    elif strategy == "tail":
        order = list(range(total - 1, -1, -1))
    elif strategy == "middle":
        order = list(_middle_order(total))
    elif strategy == "random":
        # One hash a thought: the same draw under every version of Python.
        order = sorted(range(total), key=lambda index: _hash(f"{seed}\0{row_id}\0{index}"))
    else:
        raise ValueError(f"{strategy} does not select thoughts")
    return order


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def last_first(order: Sequence[int], protect: int) -> list[int]:
    """The order with the last thoughts of the trace moved to its front.

    Args:
        order: as from `taking_order`.
        protect: how many.
    """
    last = range(len(order) - 1, max(len(order) - protect, 0) - 1, -1)
    return [*last, *(index for index in order if index not in last)]


def _edges_order(total: int, rho: float) -> Iterator[int]:
    above, below = exact(rho).as_integer_ratio()
    tail = 0
    for kept in range(1, total + 1):
        grown = above * kept // below  # as in edge_counts
        yield total - grown if grown > tail else kept - grown - 1
        tail = grown


def _middle_order(total: int) -> Iterator[int]:
    before = -1
    for kept in range(1, total + 1):
        first = (total - kept) // 2
        yield first if first != before else first + kept - 1
        before = first


def budget_count(order: Sequence[int], sizes: Sequence[int], tau: float | Fraction, least: int = 1) -> int:
    """Number of thoughts that a token budget allows: thoughts are taken until the next would exceed `tau T`.

    Args:
        order: as from `taking_order`.
        sizes: tokens of each thought; T is their sum.
        tau: condensation ratio in (0, 1].
        least: taken even when they exceed the budget.

    Returns:
        k, at least `min(least, n)`.
    """
    budget = exact(tau) * sum(sizes)
    used = 0
    for kept, index in enumerate(order):
        used += sizes[index]
        if used > budget:
            return min(max(kept, least), len(order))
    return len(order)
