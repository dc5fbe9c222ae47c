"""DemonstrationData: demonstrations in any known format, handed out in rounds of reward steps and policy steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader, Dataset

from lit_reason.data.datamodule import TraceData
from lit_reason.data.loader import BinSampler, OrderedLoader
from lit_reason.data.token_row import Segment, TokenRow
from lit_reason.envs.task_data import TaskBatch
from lit_reason.errors import UserError
from lit_reason.regimes.irl.held_out import HeldOutPair, by_kind, read_pairs

SECTIONS, ROLLOUTS, PAIRS = range(3)  # streams of random order: prompts of a round, of the policy's steps; pairs


class Demonstration(NamedTuple):
    """A demonstration in tokens: what stands before the answer, and the answer with its end token."""

    name: str
    prompt: np.ndarray
    answer: np.ndarray


@dataclass(frozen=True)
class RoundPlan:
    """Optimizer steps of a round, those of the reward first.

    Attributes:
        reward_steps: of the reward.
        policy_steps: of the policy.
        updates: policy steps on one batch of rollouts.
    """

    reward_steps: int
    policy_steps: int
    updates: int = 1

    def place(self, step: int) -> tuple[Literal["reward", "policy"], int]:
        """The phase of a round's step, and how many steps of that phase come before it.

        Args:
            step: of the round, from 0.
        """
        return ("reward", step) if step < self.reward_steps else ("policy", step - self.reward_steps)


@dataclass(frozen=True)
class RoundBatch(TaskBatch):
    """One micro-batch's place in a run.

    Attributes:
        round: how many rounds came before.
        phase: whose step it is.
        step: how many steps of this phase came before in this round.
    """

    round: int
    phase: Literal["reward", "policy"]
    step: int


class RoundSampler(BinSampler):
    """Places in a run: an epoch is a round. What a place holds is a function of it and the seed alone.

    Args:
        plan: of a round.
        accumulate: micro-batches in a step.
        rank: this process among `world`.
        world: number of data-parallel processes.
    """

    def __init__(self, plan: RoundPlan, *, accumulate: int, rank: int, world: int) -> None:
        one = np.ones(1, dtype=np.int64)
        super().__init__(one, one, batch_tokens=None, shuffle=False, accumulate=accumulate, rank=rank, world=world)
        self.steps = plan

    @property
    def bins(self) -> int:
        """Micro-batches of a round on all processes together."""
        return (self.steps.reward_steps + self.steps.policy_steps) * self.accumulate * self.world

    def __iter__(self) -> Iterator[Any]:
        for at in range(self.start, len(self)):
            yield self.epoch, *divmod(at, self.accumulate)


class DemonstrationData(TraceData):
    """As `TraceData`, for inverse RL: the answers are demonstrations. `batch_rows` counts pairs, or prompts.

    Args:
        pairs_file: pairs in which people, or a checker, preferred one answer (`chosen`, `rejected` and a prompt, or
            whole conversations), to measure the reward on. Never trained on. Files by name are kinds of pairs, each
            with an accuracy of its own.
        pairs_limit: most pairs to take of each kind.
        **kwargs: as for `TraceData`.
    """

    def __init__(
        self,
        pairs_file: str | list[str] | dict[str, str | list[str]] | None = None,
        pairs_limit: int = 500,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.pairs_file, self.pairs_limit = pairs_file, pairs_limit
        self.steps: RoundPlan | None = None  # the regime sets it
        self.spans: list[tuple[int, int]] = []  # row of each usable demonstration, and where its answer begins

    def setup(self, stage: str) -> None:
        """Tokenise demonstrations and pairs.

        Args:
            stage: any of the trainer's.

        Raises:
            UserError: there are fewer than two demonstrations with an answer.
        """
        if stage == "validate" and self.pairs_file and not self.has_val:
            self.find_tokenizer()  # the pairs are all that is needed
        else:
            super().setup(stage)
        if stage == "fit" and not self.spans:
            self._find_answers()

    def _find_answers(self) -> None:
        """Demonstrations without prompt or answer are left out and counted."""
        store = self.stores["train"]
        found = [(row, _last_turn(store.row(row))) for row in range(len(store))]
        self.spans = [(row, start) for row, start in found if start is not None]
        empty = len(found) - len(self.spans)
        if empty:
            rank_zero_info(f"train: {empty} of {len(found)} demonstrations have no prompt or an empty answer: left out")
        if len(self.spans) < 2:
            raise UserError(
                f"{len(self.spans)} usable demonstration(s) in {', '.join(self.paths('train'))} ({empty} without "
                "prompt or answer): the reward is normalised by their spread, which needs at least two"
            )

    def __len__(self) -> int:
        return len(self.spans)

    def demonstration(self, i: int) -> Demonstration:
        """Demonstration number `i`.

        Args:
            i: its number.
        """
        row, start = self.spans[i]
        found = self.stores["train"].row(row)
        return Demonstration(found.row_id, found.ids[:start], found.ids[start:])

    def tasks(self, stream: int, first: int, count: int) -> list[dict[str, Any]]:
        """Prompts from an endless shuffled stream of the demonstrations' own.

        Args:
            stream: which stream.
            first: prompts of it that came before.
            count: how many to take.
        """
        chosen = shuffled([self.seed, stream], first, count, len(self))
        return [self.task(int(i), f"{stream}.{first + n}") for n, i in enumerate(chosen)]

    def task(self, i: int, place: str) -> dict[str, Any]:
        """A prompt to answer.

        Args:
            i: number of its demonstration.
            place: what tells it from other appearances of the same prompt; random streams depend on it.
        """
        found = self.demonstration(i)
        return {"row": i, "row_id": f"{found.name}@{place}", "ids": found.prompt.tolist()}

    def train_dataloader(self) -> OrderedLoader:  # type: ignore[override]
        """The micro-batches of rounds."""
        ranks = (self.trainer.distributed_sampler_kwargs if self.trainer else None) or {}
        accumulate = self.trainer.accumulate_grad_batches if self.trainer else 1
        assert self.steps is not None, "the regime says how long rounds are"
        rank, world = ranks.get("rank", 0), ranks.get("num_replicas", 1)
        sampler = RoundSampler(self.steps, accumulate=accumulate, rank=rank, world=world)
        return OrderedLoader(_Places(self, sampler), sampler)

    # ---- held-out pairs ----

    def held_out_pairs(self) -> list[HeldOutPair]:
        """Better and other answer of each pair of `pairs_file`, in turn of every kind."""
        limits = {"max_length": self.max_length, "limit": self.pairs_limit, "max_bad_rows": self.max_bad_rows}
        return read_pairs(by_kind(self.pairs_file), self.renderer, **limits)

    def val_dataloader(self) -> DataLoader | list:  # type: ignore[override]
        """Held-out pairs, `batch_rows` at a time, all of them on every process; nothing without `pairs_file`."""
        if not self.pairs_file:
            return []
        size, pairs = self.batch_rows or 1, self.held_out_pairs()
        batches = [pairs[i : i + size] for i in range(0, len(pairs), size)]
        return DataLoader(batches, batch_size=None, collate_fn=_same)  # type: ignore[arg-type]


class _Places(Dataset):
    def __init__(self, data: DemonstrationData, sampler: RoundSampler) -> None:
        self.data, self.sampler = data, sampler

    def __getitem__(self, at: tuple[int, int, int]) -> RoundBatch:
        (number, step, part), s, data = at, self.sampler, self.data
        phase, step = s.steps.place(step)
        if phase == "reward":
            return RoundBatch((), -1, part, number, phase, step)
        played, update = divmod(step, s.steps.updates)
        played += number * -(-s.steps.policy_steps // s.steps.updates)
        size = (data.batch_rows or 1) * s.accumulate * s.world
        tasks = data.tasks(ROLLOUTS, played * size, size)[s.rank :: s.world]
        return RoundBatch(tuple(tasks), played, update * s.accumulate + part, number, phase, step)


def _same(batch: Any) -> Any:
    return batch


def shuffled(seed: Sequence[int], first: int, count: int, size: int) -> np.ndarray:
    """A stretch of an endless sequence of permutations of `range(size)`, one after the other.

    Args:
        seed: of the permutations.
        first: numbers that come before the stretch.
        count: its length.
        size: of a permutation.
    """
    passes = range(first // size, (first + count - 1) // size + 1)
    whole = np.concatenate([np.random.default_rng([*seed, number]).permutation(size) for number in passes])
    return whole[first - passes[0] * size :][:count]


def _last_turn(row: TokenRow) -> int | None:
    """Where the last answer of a row begins; None where nothing stands before it, or it says nothing."""
    spoken = row.segment != Segment.PROMPT
    start = len(row) - int(np.argmin(spoken[::-1])) if not spoken.all() else 0
    says = (row.segment[start:] != Segment.END).any()
    return start if start and spoken[-1] and says else None


def with_steps(data: Any, plan: RoundPlan) -> None:
    """Tell a data module how long rounds are.

    Args:
        data: of the run.
        plan: of a round.

    Raises:
        UserError: it hands out no rounds, or counts tokens where pairs are counted.
    """
    if not isinstance(data, DemonstrationData):
        raise UserError(f"IRLRegime needs demonstrations: use data DemonstrationData, not {type(data).__name__}")
    if not data.batch_rows:
        raise UserError("data.batch_rows is missing: give the pairs, and the prompts, of a micro-batch")
    data.steps = dataclasses.replace(plan)
