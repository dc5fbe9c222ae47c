"""A response as a game: its players are masked or there, and the reward says what a coalition is worth.

Shape letters: N coalitions, P players, T tokens of a response, L tokens of prompt and response.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import cached_property

import torch
from torch import Tensor

from lit_reason.errors import UserError
from lit_reason.rewards.attribution.config import Masking
from lit_reason.rewards.attribution.masking import masked_copies
from lit_reason.rewards.attribution.players import NOBODY, count

Score = Callable[[Tensor, Tensor], Tensor]  # ids [N, L], attention [N, L] -> scores [N]


class TimedOut(Exception):
    """The time for explaining one response is over."""


class Game:
    """The worth of coalitions of players, each scored once.

    Args:
        score: `(ids [N, L], attention [N, L]) -> [N]`.
        prompt: token ids before the response.
        response: token ids.
        player_T: player of each token of the response.
        masking: what stands for masked tokens.
        fill_id: see `masked_copies`.
        reference: see `masked_copies`.
        batch: copies scored at once.
        repeats: scores averaged, for a reward that is not deterministic.
        deadline: time (`time.monotonic`) after which no further batch is scored.

    Attributes:
        P: number of players.
        calls: copies scored so far, repeats included.
    """

    def __init__(
        self,
        score: Score,
        prompt: Sequence[int],
        response: Sequence[int],
        player_T: Tensor,
        masking: Masking = "pad",
        *,
        fill_id: int | None = None,
        reference: Sequence[int] | None = None,
        batch: int = 256,
        repeats: int = 1,
        deadline: float = float("inf"),
    ) -> None:
        self.score, self.prompt, self.response, self.player_T = score, list(prompt), list(response), player_T
        self.masking, self.fill_id, self.reference = masking, fill_id, reference
        self.batch, self.repeats, self.deadline = batch, repeats, deadline
        self.P, self.calls = count(player_T), 0
        self._known: dict[bytes, float] = {}

    def __call__(self, present_NP: Tensor) -> Tensor:
        """Worth of coalitions.

        Args:
            present_NP: which players are there, `bool [N, P]`.

        Returns:
            `float64 [N]`.

        Raises:
            UserError: the reward gives something else than one finite number a copy.
            TimedOut: the deadline has passed.
        """
        keys = [row.tobytes() for row in present_NP.numpy()]
        fresh = {key: i for i, key in enumerate(keys) if key not in self._known}
        rows = list(fresh.values())
        for start in range(0, len(rows), self.batch):
            chosen = rows[start : start + self.batch]
            for i, value in zip(chosen, self._scored(present_NP[chosen]), strict=True):
                self._known[keys[i]] = value
        return torch.tensor([self._known[key] for key in keys], dtype=torch.float64)

    @cached_property
    def whole(self) -> float:
        """Worth of all players: the reward of the response."""
        return float(self(torch.ones((1, self.P), dtype=torch.bool)))

    @cached_property
    def base(self) -> float:
        """Worth of nobody."""
        return float(self(torch.zeros((1, self.P), dtype=torch.bool)))

    def scored_prefixes(self) -> Tensor:
        """Reward after each token, `float64 [T + 1]`, from that of the empty response on."""
        T = len(self.response)
        ends = torch.arange(T + 1)
        ids_L = torch.tensor([*self.prompt, *self.response], dtype=torch.long)
        seen_NL = torch.arange(len(ids_L)) < (len(self.prompt) + ends)[:, None]
        parts = range(0, T + 1, self.batch)
        return torch.cat(
            [self._ask(ids_L.expand(T + 1, -1)[a : a + self.batch], seen_NL[a : a + self.batch]) for a in parts]
        )

    def _scored(self, present_NP: Tensor) -> list[float]:
        there = torch.cat([present_NP, torch.ones((len(present_NP), 1), dtype=torch.bool)], 1)  # nobody's are there
        assert NOBODY == -1
        ids_NL, seen_NL = masked_copies(
            self.prompt,
            self.response,
            there[:, self.player_T],
            self.masking,
            fill_id=self.fill_id,
            reference=self.reference,
        )
        return self._ask(ids_NL, seen_NL).tolist()

    def _ask(self, ids_NL: Tensor, seen_NL: Tensor) -> Tensor:
        if time.monotonic() > self.deadline:
            raise TimedOut
        N = len(ids_NL)
        total = torch.zeros(N, dtype=torch.float64)
        for _ in range(self.repeats):
            value_N = self.score(ids_NL, seen_NL)
            if value_N.shape != (N,) or not bool(value_N.isfinite().all()):
                raise UserError(
                    f"the reward gave {value_N.tolist()[:4]} ... of shape {tuple(value_N.shape)} for {N} responses: "
                    "one finite number each is needed"
                )
            total += value_N.detach().double().cpu()
        self.calls += N * self.repeats
        return total / self.repeats
