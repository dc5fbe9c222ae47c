"""Back ends that keep nothing between turns: each turn is a request that holds all ids so far."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from lit_reason.errors import UserError
from lit_reason.models.language_model import LanguageModel
from lit_reason.rollout.backend import Backend, Turn, TurnEnds
from lit_reason.rollout.config import SamplingConfig
from lit_reason.rollout.draw import words_of


@dataclass(frozen=True)
class Request:
    """One turn to be written.

    Attributes:
        ids: everything so far.
        limit: most tokens to write, at least 1.
        seed: a function of (seed, name, rollout, turn), below 2^31.
        where: which prompt, rollout and turn, for messages.
    """

    ids: list[int]
    limit: int
    seed: int
    where: str


@dataclass
class _Row:
    ids: list[int]
    key: tuple[int, ...]  # hash of its name, which rollout
    name: str  # of its prompt, for messages
    turns: int = 0


class WholePrefix(Backend):
    """Rows of which the other side knows nothing but the ids of each request.

    Args:
        lm: the trainer's model.
        tokenizer: decodes, and nothing else.
        sampling: temperature, truncation and seed.
        stop_ids: tokens that end a turn.
    """

    def __init__(self, lm: LanguageModel, tokenizer: Any, sampling: SamplingConfig, stop_ids: Sequence[int]) -> None:
        self.lm, self.sampling, self.ends = lm, sampling, TurnEnds(tokenizer, stop_ids)
        self._rows: list[_Row] = []

    @abstractmethod
    def complete(self, requests: Sequence[Request], stops: Sequence[str]) -> list[tuple[list[int], list[float]]]:
        """Write a turn for each request; tokens behind its end are cut off by the caller.

        Args:
            requests: at least one.
            stops: texts that end a turn.

        Returns:
            Sampled ids of each request, and the log-probability of each.
        """

    def open(self, prompts: Sequence[Sequence[int]], names: Sequence[str] | None = None) -> None:  # noqa: D102
        for p, ids in enumerate(prompts):
            if not len(ids):
                raise UserError(f"prompt {p} is empty: there is nothing to continue")
        names = names or [str(p) for p in range(len(prompts))]
        self._rows = [
            _Row(list(ids), (*words_of(name.encode()), 0), name) for ids, name in zip(prompts, names, strict=True)
        ]

    def fork(self, copies: int) -> None:  # noqa: D102
        self._rows = [
            replace(row, ids=list(row.ids), key=(*row.key[:-1], row.key[-1] * copies + c))
            for row in self._rows
            for c in range(copies)
        ]

    def ids(self, row: int) -> list[int]:  # noqa: D102
        return list(self._rows[row].ids)

    def append(self, row: int, ids: Sequence[int]) -> None:  # noqa: D102
        self._rows[row].ids += ids

    def keep(self, rows: Sequence[int]) -> None:  # noqa: D102
        self._rows = [self._rows[i] for i in rows]

    def step(self, limits: Sequence[int], stops: Sequence[str] = ()) -> list[Turn]:  # noqa: D102
        stops = [s for s in stops if s]
        asked = [i for i, limit in enumerate(limits) if limit > 0]
        requests = [self._asked(self._rows[i], limits[i]) for i in asked]
        turns = [self.ends.turn([], [], "length")] * len(limits)
        for i, (ids, logprobs) in zip(asked, self.complete(requests, stops) if requests else [], strict=True):
            turns[i] = self._turn(ids, logprobs, limits[i], stops)
            self.append(i, turns[i].ids)
        for row in self._rows:
            row.turns += 1
        return turns

    def _turn(self, ids: list[int], logprobs: list[float], limit: int, stops: Sequence[str]) -> Turn:
        found = self.ends.first(ids, stops)
        if found is None and len(ids) != limit:
            raise UserError(
                f"{self.sampler}: a turn of {len(ids)} tokens ended before its limit of {limit} and without a known "
                f"end (end tokens {sorted(self.ends.stop_ids)}, stop strings {list(stops)}); last tokens: {ids[-3:]}"
            )
        length, stop = found or (limit, "length")
        return self.ends.turn(ids[:length], logprobs[:length], stop)

    def _asked(self, row: _Row, limit: int) -> Request:
        text = repr((self.sampling.seed, row.key, row.turns)).encode()
        seed = int.from_bytes(hashlib.blake2b(text, digest_size=4).digest()) >> 1
        where = f"prompt '{row.name}', rollout {row.key[-1]}, turn {row.turns}"
        return Request(list(row.ids), limit, seed, where)
