"""Forget rows and retain rows in one pack, and the order in which they meet.

Shape letters: T tokens of a pack, N rows in it, S trained tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from lit_reason.data.loader import Bin, BinSampler
from lit_reason.data.packing import Pack, pack_rows
from lit_reason.data.token_row import TokenRow
from lit_reason.data.unlearning.rows import Role


@dataclass
class RolePack(Pack):
    """A pack that knows which row each trained token belongs to, and why that row is there.

    Attributes:
        roles: `Role` of each of the N rows; rows of one role stand together.
        sequence: `int64 [S]` number of the row that each trained token belongs to.
        role: `int64 [S]` role of that row.
        counts: 1 for each of the N rows; 0 for a stand-in, which is there to keep processes in step and has no tokens.
        step_tokens: trained tokens of each role in the whole optimizer step, over micro-batches and ranks.
        step_rows: rows of each role in it.
        reference: `float32 [N]` summed log-probability of each row before training; None where nobody cached it.
    """

    roles: tuple[Role, ...] = ()
    sequence: torch.Tensor = dataclasses.field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    role: torch.Tensor = dataclasses.field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    counts: torch.Tensor = dataclasses.field(default_factory=lambda: torch.zeros(0))
    step_tokens: Mapping[Role, float] = dataclasses.field(default_factory=dict)
    step_rows: Mapping[Role, int] = dataclasses.field(default_factory=dict)
    reference: torch.Tensor | None = None

    def rows_of(self, role: Role) -> slice:
        """The rows of one role."""
        return slice(sum(r < role for r in self.roles), sum(r <= role for r in self.roles))


class RoleBin(NamedTuple):
    """The rows of one micro-batch, and what its whole optimizer step holds."""

    rows: tuple[int, ...]
    step_tokens: Mapping[Role, float]
    step_rows: Mapping[Role, int]
    stand_in: bool = False


class RoleRows(Dataset):
    """Token rows by number, each with a role; bins in, packs out.

    Args:
        rows: the rows.
        roles: their roles.
    """

    def __init__(self, rows: Sequence[TokenRow], roles: Sequence[Role]) -> None:
        self.rows, self.roles = list(rows), np.array(roles, dtype=np.int64)
        self.lengths = np.array([len(row) for row in rows], dtype=np.int64)
        self.trained = np.array([np.count_nonzero(row.weight) for row in rows], dtype=np.int64)
        self.reference: dict[str, float] = {}  # by row id and role, see `key`

    def numbers(self, *roles: Role) -> np.ndarray:
        """Numbers of all rows that have one of some roles, in order."""
        return np.flatnonzero(np.isin(self.roles, roles))

    def whole(self) -> RoleRows:
        """The same rows with all tokens trained but the first of each; cached references are shared, not copied."""
        rows = [dataclasses.replace(row, weight=(np.arange(len(row)) > 0).astype(np.float32)) for row in self.rows]
        whole = RoleRows(rows, [Role(int(role)) for role in self.roles])
        whole.reference = self.reference
        return whole

    def key(self, i: int) -> str:
        """Name of a row's cached reference."""
        return f"{int(self.roles[i])} {self.rows[i].row_id}"

    def totals(self, numbers: Sequence[int]) -> tuple[dict[Role, float], dict[Role, int]]:
        """Trained tokens, and rows, of each role among some rows.

        Args:
            numbers: which rows.
        """
        of = [Role(int(r)) for r in self.roles[list(numbers)]]
        tokens: dict[Role, float] = {}
        for i, role in zip(numbers, of, strict=True):
            tokens[role] = tokens.get(role, 0.0) + float(self.trained[i])
        return tokens, {role: of.count(role) for role in tokens}

    def __getitem__(self, chosen: RoleBin | Bin) -> RolePack:
        if isinstance(chosen, RoleBin):
            return self.pack(chosen.rows, chosen.step_tokens, chosen.step_rows, stand_in=chosen.stand_in)
        return self.pack(chosen.rows or (0,), {}, {}, stand_in=not chosen.rows)

    def pack(
        self,
        numbers: Sequence[int],
        step_tokens: Mapping[Role, float],
        step_rows: Mapping[Role, int],
        *,
        stand_in: bool = False,
    ) -> RolePack:
        """Lay rows end to end, those of one role together.

        Args:
            numbers: at least one row.
            step_tokens: see `RolePack`.
            step_rows: see `RolePack`.
            stand_in: the rows carry no loss.
        """
        order = sorted(numbers, key=lambda i: self.roles[i])  # stable: forget rows and their refusals stay aligned
        rows = [self.rows[i] for i in order]
        roles = tuple(Role(int(self.roles[i])) for i in order)
        plain = pack_rows(rows, max(sum(step_tokens.values()), 1.0), trained=not stand_in)
        sequence = torch.searchsorted(plain.cu_seqlens.long(), plain.index, right=True) - 1
        known = [self.reference.get(self.key(i)) for i in order]
        return RolePack(
            **vars(plain),
            roles=roles,
            sequence=sequence,
            role=torch.tensor(roles, dtype=torch.long)[sequence],
            counts=torch.full((len(rows),), float(not stand_in)),
            step_tokens=step_tokens,
            step_rows=step_rows,
            reference=None if None in known else torch.tensor(known, dtype=torch.float32),
        )


class PairSampler(BinSampler):
    """Micro-batches of anchor rows, each with `ratio` partner rows, all a pure function of the place in the run.

    Anchor rows come once an epoch in a new order. Partner rows are walked through in turn: none comes again before all
    others came, also over epochs. Which partners an anchor row meets does not depend on the size of micro-batches or
    the number of processes.

    With `chunk_rows` the anchor rows are dealt into chunks once for the whole run, and a chunk is passed over
    `chunk_passes` times before the next one comes; an epoch is then so many passes over all of them (chunked
    unlearning as in AILS-NTUA's entry to SemEval-2025 Task 4).

    Args:
        rows: all rows.
        anchor: numbers of the rows that an epoch is a pass over.
        partner: numbers of the rows that accompany them; may be empty.
        beside: for an anchor row the number of a further row that always comes with it.
        batch_rows: anchor rows in a micro-batch.
        ratio: partner rows for each anchor row.
        chunk_rows: anchor rows in a chunk, or None.
        chunk_passes: passes over a chunk before the next.
        seed: seed of the order.
        accumulate: micro-batches in an optimizer step.
        rank: this process among `world`.
        world: number of data-parallel processes.
    """

    def __init__(
        self,
        rows: RoleRows,
        anchor: np.ndarray,
        partner: np.ndarray,
        *,
        beside: Mapping[int, int] | None = None,
        batch_rows: int,
        ratio: int = 1,
        chunk_rows: int | None = None,
        chunk_passes: int = 1,
        seed: int = 0,
        accumulate: int = 1,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        ones = np.ones(len(anchor))
        super().__init__(
            ones.astype(np.int64),
            ones,
            batch_tokens=None,
            batch_rows=batch_rows,
            shuffle=True,
            seed=seed,
            accumulate=accumulate,
            rank=rank,
            world=world,
        )
        self.rows, self.anchor, self.partner, self.beside = rows, anchor, partner, beside or {}
        self.ratio = ratio if len(partner) else 0
        self.chunk_rows, self.chunk_passes = chunk_rows or len(anchor), chunk_passes if chunk_rows else 1
        self._walks: dict[int, np.ndarray] = {}

    @property
    def bins(self) -> int:
        """Micro-batches an epoch on all processes together."""
        return self.chunk_passes * sum(-(-len(chunk) // self.batch_rows) for chunk in self._chunks())

    def _chunks(self) -> list[np.ndarray]:
        n = len(self.anchor)
        dealt = np.random.default_rng([self.seed, 2]).permutation(n) if self.chunk_rows < n else np.arange(n)
        return [dealt[i : i + self.chunk_rows] for i in range(0, n, self.chunk_rows)]

    def _by_count(self, epoch: int) -> list[tuple[int, ...]]:
        """Bins of places in this epoch: (place, anchor) pairs are flattened to `place * n + anchor`."""
        n, place, bins = len(self.anchor), 0, []
        rng = self._rng(epoch)
        for chunk in self._chunks():
            for _ in range(self.chunk_passes):
                order = rng.permutation(chunk)
                for i in range(0, len(order), self.batch_rows):
                    some = order[i : i + self.batch_rows]
                    bins.append(tuple((place + j) * n + int(row) for j, row in enumerate(some)))
                    place += len(some)
        return bins

    def _partner(self, step: int) -> int:
        """The row at a step of the endless walk through the partners."""
        count = len(self.partner)
        lap, at = divmod(step, count)
        if lap not in self._walks:
            self._walks = {lap: np.random.default_rng([self.seed, 1, lap]).permutation(count)}
        return int(self.partner[self._walks[lap][at]])

    def members(self, chosen: Sequence[int], epoch: int) -> tuple[int, ...]:
        """Numbers of all rows that a bin stands for.

        Args:
            chosen: as in `plan`.
            epoch: the epoch of the plan.
        """
        n = len(self.anchor)
        places = [divmod(value, n) for value in chosen]
        anchors = [int(self.anchor[row]) for _, row in places]
        start = epoch * n * self.chunk_passes
        partners = [self._partner((start + place) * self.ratio + k) for place, _ in places for k in range(self.ratio)]
        return (*anchors, *(self.beside[i] for i in anchors if i in self.beside), *partners)

    def __iter__(self) -> Iterator[Any]:
        plan, window = self.plan(self.epoch), self.accumulate * self.world
        for step in range(self.start, len(self)):
            at = step * self.world + self.rank
            first = at // window * window
            together = [i for chosen in plan[first : first + window] for i in self.members(chosen, self.epoch)]
            members = self.members(plan[at] or plan[0][:1], self.epoch)
            yield RoleBin(members, *self.rows.totals(together), stand_in=not plan[at])
