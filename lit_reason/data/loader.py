"""Order-exact loading: each batch is a pure function of (seed, epoch, position, rank, world).

A plain DataLoader starts its epoch again after a mid-epoch resume. Here the state is two integers, workers need
none, and a resumed run sees exactly the batches it would have seen.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from lit_reason.data.packing import Pack, fill_bins, pack_rows
from lit_reason.data.token_row import TokenRow
from lit_reason.errors import UserError


@dataclass(frozen=True)
class Bin:
    """The rows of one micro-batch, and the divisor of its loss (see `Pack.norm`)."""

    rows: tuple[int, ...]
    norm: float


class RowStore(Protocol):
    """Rows by number."""

    @property
    def trained_counts(self) -> np.ndarray:
        """`int64 [rows]` tokens of each row that carry loss."""

    def row(self, i: int) -> TokenRow:
        """Row `i`."""


class PackDataset(Dataset):
    """Bins in, packs out."""

    def __init__(self, store: RowStore) -> None:
        self.store = store

    def __getitem__(self, chosen: Bin) -> Pack:
        if chosen.rows:
            return pack_rows([self.store.row(i) for i in chosen.rows], chosen.norm)
        # A rank without rows still takes part in every collective: any row will do, untrained.
        return pack_rows([self.store.row(0)], chosen.norm, trained=False)


class BinSampler(Sampler):
    """The bins of this rank, in the order of one epoch.

    Args:
        lengths: tokens of each row.
        weight_sums: summed loss weight of each row.
        batch_tokens: tokens a bin may hold; rows are packed best-fit. None: count rows instead.
        batch_rows: rows in a bin when `batch_tokens` is None.
        shuffle: new order each epoch; False keeps the rows' own order (evaluation).
        seed: seed of the order.
        accumulate: micro-batches in an optimizer step; with `world` it decides each bin's `norm`.
        rank: this process among `world`.
        world: number of data-parallel processes.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        weight_sums: np.ndarray,
        *,
        batch_tokens: int | None,
        batch_rows: int = 1,
        shuffle: bool,
        seed: int = 0,
        accumulate: int = 1,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.lengths, self.weight_sums = lengths, weight_sums
        self.batch_rows, self.shuffle, self.seed = batch_rows, shuffle, seed
        self.accumulate, self.rank, self.world = accumulate, rank, world
        self.shapes = None if batch_tokens is None else fill_bins(lengths.tolist(), batch_tokens)
        self.epoch, self.start = 0, 0  # the present pass, and the first of its bins still to hand out
        self.drawn = False  # whether a batch was handed out since the pass began or was restored

    def __len__(self) -> int:
        """Micro-batches an epoch and rank, the same in each epoch."""
        return -(-self.bins // self.world)

    @property
    def bins(self) -> int:
        """Micro-batches an epoch on all ranks together."""
        return -(-len(self.lengths) // self.batch_rows) if self.shapes is None else len(self.shapes)

    def set_epoch(self, epoch: int) -> None:
        """Begin the next pass over the rows, unless the present one is still to be drawn from.

        Lightning calls this as one of its epochs begins, and its number is not used: a run that stopped at
        `max_steps` within a pass goes on with the rest of it in what Lightning counts as a new epoch, and after a
        resume at an epoch's end Lightning announces two epochs before it draws a batch.
        """
        if self.drawn or self.start >= len(self):
            self.epoch, self.start, self.drawn = self.epoch + 1, 0, False

    def position(self, state: dict[str, int]) -> int:
        """Where this process goes on, also when fewer or more processes share the bins than in the saved run.

        Args:
            state: of a `PackLoader`.

        Returns:
            The first bin of the pass still to hand out.

        Raises:
            UserError: the bins handed out so far do not end an optimizer step of this run.
        """
        then = state.get("world", self.world)
        done = state["position"] * then
        if then == self.world:
            return state["position"]
        if done >= self.bins:
            return len(self)
        window = self.accumulate * self.world
        if done % window:
            raise UserError(
                f"the checkpoint was made {done} micro-batches into an epoch, by {then} processes; steps of "
                f"{self.world} processes x {self.accumulate} accumulated micro-batches do not end there. Resume with "
                f"devices x accumulate_grad_batches as before"
            )
        return done // self.world

    def plan(self, epoch: int) -> list[tuple[int, ...]]:
        """All bins of an epoch in order, filled up with empty ones to a multiple of `world`."""
        if self.shapes is None:
            bins = self._by_count(epoch)
        else:
            bins = self._by_tokens(epoch)
        return bins + [()] * (len(self) * self.world - len(bins))

    def _rng(self, epoch: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, epoch])

    def _by_count(self, epoch: int) -> list[tuple[int, ...]]:
        n = len(self.lengths)
        order = self._rng(epoch).permutation(n) if self.shuffle else np.arange(n)
        return [tuple(order[i : i + self.batch_rows].tolist()) for i in range(0, n, self.batch_rows)]

    def _by_tokens(self, epoch: int) -> list[tuple[int, ...]]:
        """The shapes of the bins stay, so every epoch has as many; rows of equal length trade places."""
        assert self.shapes is not None
        if not self.shuffle:
            return sorted(tuple(sorted(rows)) for rows in self.shapes)
        rng = self._rng(epoch)
        mixed = rng.permutation(len(self.lengths))
        stand_in = np.empty(len(self.lengths), dtype=np.int64)
        # Sorted by length, position k of the fixed order and of the mixed order have the same length.
        stand_in[np.argsort(self.lengths, kind="stable")] = mixed[np.argsort(self.lengths[mixed], kind="stable")]
        bins = [tuple(int(stand_in[row]) for row in rows) for rows in self.shapes]
        return [bins[i] for i in rng.permutation(len(bins))]

    def __iter__(self) -> Iterator[Bin]:
        plan = self.plan(self.epoch)
        window = self.accumulate * self.world
        for step in range(self.start, len(self)):
            at = step * self.world + self.rank
            first = at // window * window
            together = [row for rows in plan[first : first + window] for row in rows]
            norm = float(self.weight_sums[together].sum()) if together else 1.0
            yield Bin(plan[at], norm)


def _as_is(pack: Pack) -> Pack:
    return pack


class OrderedLoader(DataLoader):
    """A DataLoader that remembers its place; Lightning saves and restores the integers.

    Args:
        dataset: makes a batch of what the sampler yields.
        sampler: the order.
        workers: loading processes; 0 loads in the main one.
    """

    sampler: BinSampler

    def __init__(self, dataset: Dataset, sampler: BinSampler, workers: int = 0) -> None:
        super().__init__(
            dataset,
            batch_size=None,
            sampler=sampler,
            num_workers=workers,
            collate_fn=_as_is,  # type: ignore[arg-type]
            persistent_workers=False,
            # Its own generator: a DataLoader draws a base seed at each iter(), which would shift dropout on resume.
            generator=torch.Generator().manual_seed(sampler.seed),
        )
        self.position = 0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        self.position = self.sampler.start
        for pack in super().__iter__():
            self.position += 1
            self.sampler.drawn = True
            yield pack

    def state_dict(self) -> dict[str, int]:
        """The present pass, batches of it already handed out, and among how many processes they are dealt."""
        return {"epoch": self.sampler.epoch, "position": self.position, "world": self.sampler.world}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on after the last batch handed out, also when fewer or more processes share the batches now."""
        self.position = self.sampler.position(state)
        self.sampler.epoch, self.sampler.start, self.sampler.drawn = state["epoch"], self.position, False


class PackLoader(OrderedLoader):
    """An ordered loader of packs.

    Args:
        store: the rows.
        sampler: the order.
        workers: loading processes; 0 loads in the main one.
    """

    def __init__(self, store: RowStore, sampler: BinSampler, workers: int = 0) -> None:
        super().__init__(PackDataset(store), sampler, workers)
        self.store = store

    def steps_for(self, trained_tokens: float) -> int:
        """The number of optimizer steps, at least 1, whose trained tokens come nearest to a budget.

        Args:
            trained_tokens: the budget, over all processes; rows are passed over as often as it takes.

        Raises:
            UserError: no row has a trained token.
        """
        sampler, counts = self.sampler, self.store.trained_counts
        if not counts.any():
            raise UserError("a budget of trained tokens: no token of the training rows is trained")
        window = sampler.accumulate * sampler.world
        done, steps, epoch = 0, 0, 0
        while True:
            plan = sampler.plan(epoch)
            for first in range(0, len(plan), window):
                step = sum(int(counts[list(rows)].sum()) for rows in plan[first : first + window])
                if done + step >= trained_tokens:
                    return max(1, steps + int(done + step - trained_tokens <= trained_tokens - done))
                done, steps = done + step, steps + 1
            epoch += 1
