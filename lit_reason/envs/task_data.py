"""TaskData: tasks for on-policy training, a batch of them for every round of rollouts."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from lightning.pytorch import LightningDataModule
from torch.utils.data import Dataset

from lit_reason.data.loader import Bin, BinSampler, OrderedLoader
from lit_reason.data.reading.records import read_every_record
from lit_reason.envs.environment import Environment
from lit_reason.errors import UserError
from lit_reason.rewards.composition import Rewards


@dataclass(frozen=True)
class TaskBatch:
    """The tasks of one round of rollouts, handed out once for every micro-batch that is made of them.

    Attributes:
        tasks: rows of this process.
        number: how many rounds came before, over all epochs; equal numbers mean the same rollouts.
        part: which micro-batch of the round this is.
    """

    tasks: tuple[dict[str, Any], ...]
    number: int
    part: int

    def to(self, device: Any, non_blocking: bool = False) -> TaskBatch:
        """Itself: tasks stay in main memory, whatever device the policy is on."""
        return self


class TaskSampler(BinSampler):
    """Every bin of tasks `parts` times in a row on each process, otherwise as `BinSampler`.

    Args:
        count: number of tasks.
        parts: micro-batches made of the rollouts of one bin.
        batch_rows: tasks in a bin.
        shuffle: new order each epoch.
        seed: seed of the order.
        rank: this process among `world`.
        world: number of data-parallel processes.
    """

    def __init__(
        self, count: int, parts: int, *, batch_rows: int, shuffle: bool, seed: int = 0, rank: int = 0, world: int = 1
    ) -> None:
        super().__init__(
            np.ones(count, dtype=np.int64),
            np.ones(count),
            batch_tokens=None,
            batch_rows=batch_rows,
            shuffle=shuffle,
            seed=seed,
            accumulate=parts,
            rank=rank,
            world=world,
        )
        self.parts = parts

    @property
    def rounds(self) -> int:
        """Rounds of rollouts an epoch."""
        return -(-super().bins // self.world)

    @property
    def bins(self) -> int:
        """Micro-batches an epoch on all processes together."""
        return self.rounds * self.world * self.parts

    def plan(self, epoch: int) -> list[tuple[int, ...]]:
        """All bins of an epoch in order, those of one round together; a process left without tasks gets the first."""
        bins = self._by_count(epoch)
        bins += [bins[0]] * (self.rounds * self.world - len(bins))
        rounds = [bins[i : i + self.world] for i in range(0, len(bins), self.world)]
        return [rows for together in rounds for _ in range(self.parts) for rows in together]

    def __iter__(self) -> Iterator[Any]:
        for at, chosen in enumerate(super().__iter__(), self.start):
            yield _Chosen(chosen, self.epoch * self.rounds + at // self.parts, at % self.parts)


@dataclass(frozen=True)
class _Chosen:
    bin: Bin
    number: int
    part: int


class _Tasks(Dataset):
    def __init__(self, tasks: Sequence[dict[str, Any]]) -> None:
        self.tasks = tasks

    def __getitem__(self, chosen: _Chosen) -> TaskBatch:
        return TaskBatch(tuple(self.tasks[i] for i in chosen.bin.rows), chosen.number, chosen.part)


class TaskData(LightningDataModule):
    """Hands out tasks of an environment, from a file or made up by the environment itself.

    Args:
        env: the environment, as class and arguments; each rollout gets one of its own.
        rewards: what is paid, as weights by name: rewards of `lit_reason.rewards.tool_use`, `environment`,
            `checker:NAME`, or `package.module:function`; default: what the environment pays.
        train_file: tasks to train on, one record each, with the fields that the environment reads; default: made up.
        val_file: tasks to validate on; default: made up, others than those to train on.
        test_file: tasks for `test`; default: made up, others than all these.
        count: tasks to make up for training.
        val_count: tasks to make up for validation, or most tasks to take of `val_file`; 0 validates on none.
        test_count: the same for `test`.
        batch_rows: tasks of a micro-batch on each process; a round plays those of all its accumulated micro-batches.
        seed: seed of made-up tasks and of their order.
    """

    def __init__(
        self,
        env: Callable[[], Environment],
        rewards: dict[str, float] | None = None,
        train_file: str | list[str] | None = None,
        val_file: str | list[str] | None = None,
        test_file: str | list[str] | None = None,
        count: int = 1000,
        val_count: int = 100,
        test_count: int = 100,
        batch_rows: int = 8,
        seed: int = 0,
    ) -> None:
        super().__init__()
        least_of = {"count": 1, "val_count": 0, "test_count": 1, "batch_rows": 1}
        counts = {"count": count, "val_count": val_count, "test_count": test_count, "batch_rows": batch_rows}
        for name, least in least_of.items():
            if (given := counts[name]) < least:
                raise UserError(f"data.{name} is {given}; it must be at least {least}")
        self.rewards = Rewards(rewards)
        self.env, self.files = env, {"train": train_file, "val": val_file, "test": test_file}
        self.counts = {"train": count, "val": val_count, "test": test_count}
        self.batch_rows, self.seed = batch_rows, seed
        self.tasks: dict[str, list[dict[str, Any]]] = {}
        self.updates = 1  # an on-policy regime sets how many optimizer steps it takes on a round

    def setup(self, stage: str) -> None:
        """Read or make up the tasks.

        Args:
            stage: any of the trainer's.

        Raises:
            UserError: a file holds no task, or the environment makes up none.
        """
        for split in ("test",) if stage == "test" else ("train", "val"):
            if split not in self.tasks and self.counts[split]:
                self.tasks[split] = self._read(split) if self.files[split] else self._made_up(split)

    def _read(self, split: str) -> list[dict[str, Any]]:
        given = self.files[split]
        paths = [given] if isinstance(given, str) else list(given or ())
        rows = [{"row_id": row_id, **record} for row_id, record in read_every_record(paths)]
        if not rows:
            raise UserError(f"data.{split}_file: {', '.join(paths)} holds no task")
        rows = rows if split == "train" else rows[: self.counts[split]]
        env = self.env()
        for row in rows:
            try:
                env.check(row)
            except UserError as error:
                raise UserError(f"data.{split}_file, row {row['row_id']}: {error}") from error
        env.close()
        return rows

    def _made_up(self, split: str) -> list[dict[str, Any]]:
        env = self.env()
        before = {"train": (), "val": ("train",), "test": ("train", "val")}[split]
        first = sum(self.counts[other] for other in before)  # never a task of another split
        made = [{"row_id": f"{split}-{i}", **env.task(i, self.seed)} for i in range(first, first + self.counts[split])]
        env.close()
        return made

    def others(self, tasks: Sequence[dict[str, Any]], *key: int) -> tuple[dict[str, Any], ...]:
        """Another task to train on for each of some that turned out to teach nothing, drawn at random.

        Args:
            tasks: those to be replaced. Each draw depends on the task's name, not on its place or its process.
            key: numbers that the draws depend on, beside the seed.
        """
        seeds = [[self.seed, zlib.crc32(str(task["row_id"]).encode()), *key] for task in tasks]
        drawn = [np.random.default_rng(seed).integers(len(self.tasks["train"])) for seed in seeds]
        return tuple(self.tasks["train"][i] for i in drawn)

    def _loader(self, split: str, *, accumulate: int = 1, updates: int = 1, shuffle: bool) -> OrderedLoader:
        spread = getattr(self.trainer, "distributed_sampler_kwargs", None) or {}
        sampler = TaskSampler(
            len(self.tasks[split]),
            accumulate * updates,
            batch_rows=self.batch_rows * accumulate,
            shuffle=shuffle,
            seed=self.seed,
            rank=spread.get("rank", 0),
            world=spread.get("num_replicas", 1),
        )
        return OrderedLoader(_Tasks(self.tasks[split]), sampler)

    def train_dataloader(self) -> OrderedLoader:
        """Rounds of tasks, each handed out once for every micro-batch made of it."""
        accumulate = self.trainer.accumulate_grad_batches if self.trainer else 1
        return self._loader("train", accumulate=accumulate, updates=self.updates, shuffle=True)

    def val_dataloader(self) -> OrderedLoader | list[Any]:
        """Tasks to validate on."""
        return self._loader("val", shuffle=False) if self.counts["val"] else []

    def test_dataloader(self) -> OrderedLoader:
        """Tasks for `test`."""
        return self._loader("test", shuffle=False)
