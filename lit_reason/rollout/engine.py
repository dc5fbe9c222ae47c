"""Multi-turn generation by the trainer's own weights: ids and log-probabilities are the truth, text is derived.

Shape letters: R rows of one pass, Q new slots, V vocabulary, D width.

`Engine.open` starts rows from prompts, `step` lets the model write one turn on each, `append` adds what the
environment said, `fork` copies rows that share everything so far. The key/value cache is kept all the way; no token is
computed twice and no chat is ever rendered again. A row that is done with its turn leaves the batch until the next.

What is reproducible. Each turn has a random stream of its own, a function of (seed, name, rollout, turn), where the
name says which prompt it is. What a row samples does not depend on its neighbours or on the process it is in, but for
rounding: its logits may differ in the last bits with the shape of the batch.

Where weights lie in shards over processes, every forward pass is a collective: a process whose rows are done takes part
with a pass over padding until all are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lit_reason.errors import UserError
from lit_reason.models.language_model import LanguageModel
from lit_reason.models.layout import by_columns
from lit_reason.rollout.backend import Backend, Turn, TurnEnds
from lit_reason.rollout.broken_output import broken_output
from lit_reason.rollout.config import SamplingConfig
from lit_reason.rollout.draw import draw, exact, uniforms, words_of
from lit_reason.rollout.kv_slots import KVSlots
from lit_reason.rollout.sampler import generating

_MOST_HOLES = 0.25  # share of the slots that may be holes even in the longest row
_STILL_WRITING = 0.5  # share of the rows that others do not wait for


@dataclass
class _Row:
    """One growing sequence."""

    ids: list[int]  # everything so far
    key: tuple[int, ...]  # what its random streams depend on: the hash of its name, which rollout
    pending: list[int]  # the end of `ids` that the cache has not seen
    name: str  # of its prompt, for messages
    turns: int = 0
    written: list[int] = field(default_factory=list)  # of the turn that is under way
    logprobs: list[float] = field(default_factory=list)


class Engine(Backend):
    """Runs several rollouts of one model at once.

    Args:
        lm: the model that is being trained; it is in eval mode while it generates.
        tokenizer: decodes, and nothing else.
        sampling: temperature, top_p, top_k, min_p and seed are read.
        stop_ids: tokens that end a turn.
        gather: hold weights that lie in shards whole during a round; otherwise each pass gathers them layer by layer.
    """

    sampler = "own"

    def __init__(
        self,
        lm: LanguageModel,
        tokenizer: Any,
        sampling: SamplingConfig,
        stop_ids: Sequence[int],
        gather: bool = True,
    ) -> None:
        self.lm, self.sampling, self.ends, self.gather = lm, sampling, TurnEnds(tokenizer, stop_ids), gather
        self._rows: list[_Row] = []
        self._slots: KVSlots | None = None

    @contextmanager
    def round(self, version: int) -> Iterator[int]:
        """A round of rollouts, for which weights are laid out once: those in shards gathered, others for decoding.

        Args:
            version: of the weights, for the ledger.
        """
        whole = self.lm.gathered() if self.gather else nullcontext()
        with whole, by_columns(self.lm.hf), super().round(version) as held:
            yield held

    @torch.inference_mode(False)  # a validation's inference mode would make the cache unfit for the next pass
    def open(self, prompts: Sequence[Sequence[int]], names: Sequence[str] | None = None) -> None:
        """Start one row for each prompt; what was open before is dropped.

        Args:
            prompts: token ids, generation prompt included.
            names: of the prompts, on which their random streams depend; default: their numbers.

        Raises:
            UserError: a prompt is empty, or the model cannot be sampled from this way.
        """
        for p, ids in enumerate(prompts):
            if not len(ids):
                raise UserError(f"prompt {p} is empty: there is nothing to continue")
        names = names or [str(p) for p in range(len(prompts))]
        self._rows = [
            _Row(list(ids), (*words_of(name.encode()), 0), list(ids), name)
            for ids, name in zip(prompts, names, strict=True)
        ]
        self._slots = KVSlots(self.lm.base.config, len(prompts), self.lm.device)

    @torch.inference_mode(False)
    def fork(self, copies: int) -> None:
        """Copy each row, cache and all; the copies of row i are rows `i * copies` to `i * copies + copies - 1`.

        The prompt is computed once for all of them. Their random streams differ.

        Args:
            copies: rows to make of each.
        """
        longer = any(len(row.pending) > 1 for row in self._rows)
        if self.anyone(longer):
            with torch.no_grad(), generating(self.lm.hf):
                if longer:  # but for the last token: the state behind it is wanted for each copy
                    self._feed(range(len(self._rows)), but=1)
                else:
                    self._over_padding()
        assert self._slots is not None
        self._slots.select([i for i in range(len(self._rows)) for _ in range(copies)])
        self._rows = [
            replace(deepcopy(row), key=(*row.key[:-1], row.key[-1] * copies + c))
            for row in self._rows
            for c in range(copies)
        ]

    def ids(self, row: int) -> list[int]:
        """All tokens of a row so far.

        Args:
            row: its number.
        """
        return list(self._rows[row].ids)

    def append(self, row: int, ids: Sequence[int]) -> None:
        """Add tokens that the environment wrote. They are computed when the row's next turn begins.

        Args:
            row: its number.
            ids: the tokens.
        """
        self._rows[row].ids += ids
        self._rows[row].pending += ids

    @torch.inference_mode(False)
    def keep(self, rows: Sequence[int]) -> None:
        """Drop all other rows; those kept are numbered anew in the given order.

        Args:
            rows: numbers of the rows to keep.
        """
        assert self._slots is not None
        self._slots.select(list(rows))
        self._rows = [self._rows[i] for i in rows]

    def step(self, limits: Sequence[int], stops: Sequence[str] = ()) -> list[Turn]:
        """Let the model write one turn on every row.

        Args:
            limits: most tokens of each row's turn; 0 gives an empty turn.
            stops: texts that end a turn; they stay in it, with the rest of the token in which they end.

        Returns:
            One turn for each row.

        Raises:
            UserError: the model's output is NaN or infinite.
        """
        turns = self._turns(limits, stops, share=0.0)
        return [turns[i] for i in range(len(turns))]

    def first_turns(self, limits: Sequence[int], stops: Sequence[str] = ()) -> dict[int, Turn]:
        """Let the model write until half of the rows have ended their turns; the next call goes on with the others.

        A pass over few rows costs nearly as much as one over many. So no row waits for the longest turn of all: what
        has ended is answered, and its next turn is written beside the rest of the others'.

        Args:
            limits: as for `step`, counted from the beginning of a turn.
            stops: as for `step`.

        Returns:
            Turns that have ended, by row.
        """
        return self._turns(limits, stops, share=_STILL_WRITING)

    def anyone(self, busy: bool) -> bool:
        """Whether this process has work left, or, where they must run in step, any process has.

        Args:
            busy: whether this one has.
        """
        if not hasattr(self.lm.base, "run_backbone"):
            return busy
        flag = torch.tensor(int(busy), device=self.lm.device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag)

    # ---- generation ----

    @property
    def _backbone(self) -> Any:
        base: Any = self.lm.base
        return getattr(base, "run_backbone", base.base_model)  # the former where weights are in shards

    def _over_padding(self) -> Tensor:
        """The pass of a process that has nothing to do while others run theirs."""
        ids = torch.zeros((1, 1), dtype=torch.long, device=self.lm.device)
        return self._backbone(input_ids=ids, use_cache=False, return_dict=True).last_hidden_state[0]

    @torch.inference_mode(False)
    @torch.no_grad()
    def _turns(self, limits: Sequence[int], stops: Sequence[str], share: float) -> dict[int, Turn]:
        """Turns that have ended when no more than a share of the rows is still writing, by row."""
        with generating(self.lm.hf):
            ends = self._write(limits, [s for s in stops if s], share)
        return {i: self._ended(self._rows[i], end) for i, end in ends.items()}

    def _write(self, limits: Sequence[int], stops: Sequence[str], share: float) -> dict[int, str]:
        rows, seed = self._rows, self.sampling.seed
        draws = [uniforms(seed, (*row.key, row.turns), n) for row, n in zip(rows, limits, strict=True)]
        ends = dict.fromkeys(range(len(rows)), "length")
        active = [i for i, limit in enumerate(limits) if len(rows[i].written) < limit]
        few = int(share * len(active))
        self._catch_up(active)
        while self.anyone(len(active) > few):
            if not active:
                self.lm.head(self._over_padding())
                continue
            active, hidden_RD = self._feed(active)
            logits_RV = self.lm.head(hidden_RD)
            chosen, scores = self._draw(logits_RV, [float(draws[i][len(rows[i].written)]) for i in active])
            going = []
            for i, token, score in zip(active, chosen, scores, strict=True):
                row = rows[i]
                if not math.isfinite(score):
                    where = f"prompt '{row.name}', rollout {row.key[-1]}, turn {row.turns}, token {len(row.written)}"
                    raise broken_output(self.lm.hf, where, logits_RV.dtype)
                row.written.append(token)
                row.logprobs.append(score)
                self.append(i, [token])
                ended = self.ends.at_last(row.written, stops)
                if ended is not None:
                    ends[i] = ended
                elif len(row.written) < limits[i]:
                    going.append(i)
            active = going
        return {i: end for i, end in ends.items() if i not in active}

    def _ended(self, row: _Row, stop: str) -> Turn:
        turn = self.ends.turn(row.written, row.logprobs, stop)
        row.turns, row.written, row.logprobs = row.turns + 1, [], []
        return turn

    def _catch_up(self, active: Sequence[int]) -> None:
        """Read what rows were told since their last turn, where others are in the middle of one and have one token."""
        midway = any(self._rows[i].written for i in active)
        told = [i for i in active if midway and len(self._rows[i].pending) > 1]
        if not self.anyone(bool(told)):
            return
        if told:
            self._feed(told, but=1)
        else:
            self._over_padding()

    def _feed(self, active: Sequence[int], but: int = 0) -> tuple[list[int], Tensor]:
        """Run pending tokens of some rows through the model, at least one, and the last `but` of each left out.

        Returns the rows in the order of the pass, and the hidden state behind the last token of each, `[R, D]`.
        """
        slots = self._slots
        assert slots is not None, "open the engine first"
        longest = max(len(row.ids) - len(row.pending) for row in self._rows)
        if longest < (1 - _MOST_HOLES) * slots.mask_BC.shape[1]:  # holes in every row, which closing them gets rid of
            slots.select(list(range(len(self._rows))))
        active = slots.bring_forward(active)
        rows = [self._rows[i] for i in active]
        take = [len(row.pending) - but for row in rows]
        width = max(take)
        padded = [row.pending[:n] + [0] * (width - n) for row, n in zip(rows, take, strict=True)]
        for row, n in zip(rows, take, strict=True):
            row.pending = row.pending[n:]
        device = self.lm.device
        ids_RQ, take_R = torch.tensor(padded, device=device), torch.tensor(take, device=device)
        positions_RQ = slots.reserve(torch.arange(width, device=device) < take_R[:, None])
        out = self._backbone(
            input_ids=ids_RQ,
            attention_mask=slots.mask_BC[: len(rows)].long(),
            position_ids=positions_RQ,
            past_key_values=slots.cache,
            use_cache=True,
            return_dict=True,
        )
        return active, out.last_hidden_state[torch.arange(len(rows), device=device), take_R - 1]

    def _draw(self, logits_RV: Tensor, quantiles: Sequence[float]) -> tuple[list[int], list[float]]:
        s = self.sampling
        if s.temperature > 0:
            at_R = torch.tensor(quantiles, dtype=exact(logits_RV.device), device=logits_RV.device)
            chosen_R, logprob_R = draw(
                logits_RV, at_R, temperature=s.temperature, top_p=s.top_p, top_k=s.top_k, min_p=s.min_p
            )
        else:
            best_R, chosen_R = logits_RV.float().max(-1)
            logprob_R = best_R - logits_RV.float().logsumexp(-1)
        return chosen_R.tolist(), logprob_R.tolist()
