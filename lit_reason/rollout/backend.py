"""What plays dialogues needs of whatever generates: rows of token ids that grow turn by turn.

Everything that samples stands behind `Backend`: ids go in, ids and log-probabilities come out. Text is only looked at
to find the end of a turn, by one rule (`TurnEnds`) for all of them, and is never turned into ids again.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from lit_reason.errors import UserError
from lit_reason.models.language_model import LanguageModel
from lit_reason.rollout.sampler import generating

_WINDOW_MARGIN = 8  # tokens decoded beyond a stop string's length when looking for it


@dataclass(frozen=True)
class Turn:
    """What the model wrote in one turn of one row.

    Attributes:
        ids: sampled tokens, the one that ended the turn included.
        logprobs: natural log-probability of each under the tempered, untruncated distribution.
        text: `ids` as text, up to the end of the stop string or before the end token.
        stop: `end` (an end token), `length` (the limit), or the stop string.
    """

    ids: list[int]
    logprobs: list[float]
    text: str
    stop: str


class TurnEnds:
    """Where a turn ends, and its text.

    Args:
        tokenizer: decodes, and nothing else.
        stop_ids: tokens that end a turn.

    Raises:
        UserError: there are none.
    """

    def __init__(self, tokenizer: Any, stop_ids: Sequence[int]) -> None:
        if not stop_ids:
            raise UserError("no end token: the tokenizer names none (eos_token), so a turn could never end")
        self.tokenizer, self.stop_ids = tokenizer, frozenset(stop_ids)

    def at_last(self, ids: Sequence[int], stops: Sequence[str]) -> str | None:
        """What ends the turn with its last token: `end`, a stop string, or None where nothing does.

        Args:
            ids: tokens of the turn so far, at least one.
            stops: texts that end a turn, wherever in a token they lie.
        """
        if ids[-1] in self.stop_ids:
            return "end"
        if not stops:
            return None
        # A token writes at least one byte of the stop string it ends, so the string lies within this window.
        window = max(len(s.encode()) for s in stops) + _WINDOW_MARGIN
        tail = self._decode(ids[-window:])
        return next((s for s in stops if s in tail), None)

    def first(self, ids: Sequence[int], stops: Sequence[str], begin: int = 0) -> tuple[int, str] | None:
        """How many tokens the turn has, and what ends it; None where nothing does.

        Args:
            ids: tokens, perhaps beyond the end.
            stops: texts that end a turn.
            begin: tokens that are known to hold no end.
        """
        found = ((n, self.at_last(ids[:n], stops)) for n in range(begin + 1, len(ids) + 1))
        return next(((n, stop) for n, stop in found if stop is not None), None)

    def turn(self, ids: list[int], logprobs: list[float], stop: str) -> Turn:
        """The turn of these tokens.

        Args:
            ids: its tokens.
            logprobs: of each.
            stop: what ended it.
        """
        text = self._decode(ids[:-1] if stop == "end" else ids)
        if stop not in ("end", "length"):
            text = text[: text.rindex(stop) + len(stop)]
        return Turn(ids, logprobs, text, stop)

    def _decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


class Backend(ABC):
    """Rows of token ids that a model continues, turn by turn.

    Attributes:
        sampler: what samples, for the ledger.
        scorer: whose the log-probabilities are: the `sampler`'s own, or those of a forward pass by the `trainer`.
    """

    sampler: str
    scorer: str = "sampler"

    def begin_round(self, version: int) -> int:
        """Make ready to sample with the trainer's present weights.

        Args:
            version: number of policy updates that made them.

        Returns:
            The version of the weights that will sample, for the ledger.
        """
        return version

    @contextmanager
    def round(self, version: int) -> Iterator[int]:
        """A round of rollouts: what it needs is ready for as long as the context lasts.

        Args:
            version: as for `begin_round`, whose answer the context gives.
        """
        yield self.begin_round(version)

    @abstractmethod
    def open(self, prompts: Sequence[Sequence[int]], names: Sequence[str] | None = None) -> None:
        """Start one row for each prompt; what was open before is dropped.

        Args:
            prompts: token ids, generation prompt included.
            names: of the prompts, on which their random streams depend; default: their numbers.

        Raises:
            UserError: a prompt is empty, or the model cannot be sampled from this way.
        """

    @abstractmethod
    def fork(self, copies: int) -> None:
        """Copy each row; the copies of row i are rows `i * copies` to `i * copies + copies - 1`, their draws differ.

        Args:
            copies: rows to make of each.
        """

    @abstractmethod
    def ids(self, row: int) -> list[int]:
        """All tokens of a row so far.

        Args:
            row: its number.
        """

    @abstractmethod
    def append(self, row: int, ids: Sequence[int]) -> None:
        """Add tokens that the environment wrote.

        Args:
            row: its number.
            ids: the tokens.
        """

    @abstractmethod
    def keep(self, rows: Sequence[int]) -> None:
        """Drop all other rows; those kept are numbered anew in the given order.

        Args:
            rows: numbers of the rows to keep.
        """

    @abstractmethod
    def step(self, limits: Sequence[int], stops: Sequence[str] = ()) -> list[Turn]:
        """Let the model write one turn on every row.

        Args:
            limits: most tokens of each row's turn; 0 gives an empty turn.
            stops: texts that end a turn; they stay in it, with the rest of the token in which they end.

        Returns:
            One turn for each row.
        """

    def first_turns(self, limits: Sequence[int], stops: Sequence[str] = ()) -> dict[int, Turn]:
        """Let the model write until some turns have ended; by default, all.

        Args:
            limits: as for `step`, counted from the beginning of a turn.
            stops: as for `step`.

        Returns:
            Turns that have ended, at least one, by row. Those of other rows are under way: the next call goes on.
        """
        return dict(enumerate(self.step(limits, stops)))

    def anyone(self, busy: bool) -> bool:
        """Whether this process has work left, or, where processes must run in step, any process has.

        Args:
            busy: whether this one has.
        """
        return busy


@torch.no_grad()
def scores(lm: LanguageModel, written: Sequence[tuple[Sequence[int], int]], temperature: float) -> list[list[float]]:
    """Log-probabilities by one forward pass of the trainer's model, in eval mode.

    Args:
        lm: the model.
        written: sequences, and how many tokens at the end of each are to be scored; fewer than it has.
        temperature: of the softmax; 0 stands for greedy and gives those of 1.

    Returns:
        For each sequence those of its last tokens.
    """
    lengths = torch.tensor([len(ids) for ids, _ in written])
    edges = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
    ids_T = torch.tensor([token for ids, _ in written for token in ids], device=lm.device)
    positions_T = torch.cat([torch.arange(n) for n in lengths.tolist()]).to(lm.device)
    ends = zip(edges[1:].tolist(), [n for _, n in written], strict=True)
    at_S = torch.cat([torch.arange(end - n, end) for end, n in ends]).to(lm.device)
    with torch.inference_mode(False), generating(lm.hf):
        hidden_TD = lm.hidden(ids_T, positions_T, edges)
        logp_S = lm.head(hidden_TD[at_S - 1], ids_T[at_S], temperature=temperature or 1.0).logp_S.float().cpu()
    return [part.tolist() for part in logp_S.split([n for _, n in written])]
