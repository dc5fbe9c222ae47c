"""Attributor: the credit of every token of a response under each of several explainers.

Shape letters: K explainers, T tokens of a response, P players.
"""

from __future__ import annotations

import hashlib
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lit_reason.rewards.attribution.config import SIGNED, AttributionConfig, check_explainers
from lit_reason.rewards.attribution.game import Game, TimedOut
from lit_reason.rewards.attribution.lime import lime
from lit_reason.rewards.attribution.players import NOBODY, players_of, spread
from lit_reason.rewards.attribution.shapley import MOST_EXACT, exact, kernel, permutation
from lit_reason.rewards.attribution.token_credit import shares, token_credit
from lit_reason.rewards.sequence_reward import SequenceReward

CHECKED = 8  # responses scored twice, to see whether the reward is deterministic
WOBBLE = 1e-6  # of the score: a difference below it is rounding


@dataclass(frozen=True)
class Explanation:
    """How the reward of a response is spread over its tokens.

    Attributes:
        credit_KT: credit of each token under each explainer; every row sums to `reward`.
        reward: of the response.
        base: worth of the response with all players masked, or None where nobody asked.
        calls: copies that the reward scored for this.
        timed_out: the time was over; every row pays the whole reward at the last token.
        cached: an equal response was explained before.
    """

    credit_KT: Tensor
    reward: float
    base: float | None
    calls: int
    timed_out: bool = False
    cached: bool = False


class Attributor:
    """Explains responses, each by itself, so that results depend neither on order nor on the number of processes.

    The explainers' draws are seeded by (seed, prompt, response): an equal response gets equal credit wherever and
    whenever it turns up, and a cache changes nothing but the cost.

    Args:
        explainers: names, see `config.SHARES` and `config.SIGNED`.
        config: how they work.
        seed: of the draws.
        always: tokens that end a response and are no players.
        decode: ids to text, for sentences and thoughts.
    """

    def __init__(
        self,
        explainers: Sequence[str],
        config: AttributionConfig,
        *,
        seed: int = 0,
        always: Collection[int] = (),
        decode: Callable[[Sequence[int]], str] | None = None,
    ) -> None:
        check_explainers(list(explainers))
        self.explainers, self.config, self.seed = tuple(explainers), config, seed
        self.always, self.decode = frozenset(always), decode
        self._checks, self._repeats = CHECKED, 1
        self._cache: OrderedDict[bytes, Explanation] = OrderedDict()

    def explain(
        self,
        reward: SequenceReward,
        prompt: Sequence[int],
        response: Sequence[int],
        reference: Sequence[int] | None = None,
    ) -> Explanation:
        """Credit of the tokens of one response.

        Args:
            reward: scores it and its masked copies.
            prompt: token ids.
            response: token ids; may be empty, and then earns no credit.
            reference: response whose tokens stand in for masked ones, for `masking: reference`.
        """
        key = self._key(reward.version, prompt, response, reference)
        if key in self._cache:
            self._cache.move_to_end(key)
            return replace(self._cache[key], calls=0, cached=True)
        found = self._explain(reward, list(prompt), list(response), reference, key)
        if self.config.cache and not found.timed_out:
            self._cache[key] = found
            if len(self._cache) > self.config.cache:
                self._cache.popitem(last=False)
        return found

    def _key(self, version: str, *sequences: Sequence[int] | None) -> bytes:
        text = repr((self.seed, version, *(None if s is None else list(s) for s in sequences)))
        return hashlib.blake2b(text.encode(), digest_size=16).digest()

    def _explain(
        self,
        reward: SequenceReward,
        prompt: list[int],
        response: list[int],
        reference: Sequence[int] | None,
        key: bytes,
    ) -> Explanation:
        c, T = self.config, len(response)
        deadline = time.monotonic() + c.timeout_s
        kind = {"span_tokens": c.span_tokens, "always": self.always, "decode": self.decode}
        player_T = players_of(response, c.players, **kind)  # type: ignore[arg-type]

        def game(players: Tensor) -> Game:
            masks = {"fill_id": c.fill_id, "reference": reference, "batch": c.batch, "repeats": self._repeats}
            return Game(reward, prompt, response, players, c.masking, **masks)  # type: ignore[arg-type]

        main = game(player_T)
        calls = self._check(main)
        if main.repeats != self._repeats:
            main = game(player_T)
        value = main.whole  # the reward itself is needed, however long it takes
        tokens = game(players_of(response, "token", always=self.always))
        main.deadline = tokens.deadline = deadline
        asked, base, timed_out = self._asked(key), None, False
        try:
            rows = [
                self._row(name, reward, main, tokens, value, key) if T else torch.zeros(0, dtype=torch.float64)
                for name in asked
            ]
            base = main.base if set(asked) & set(SIGNED) else None
        except TimedOut:
            rows, timed_out = [value * _at_end(T)[0]] * len(asked), True
        return Explanation(torch.stack(rows), value, base, calls + main.calls + tokens.calls, timed_out)

    def _asked(self, key: bytes) -> list[str]:
        """The explainers for this response: all, or for a part of the responses those without masked copies."""
        chosen = int.from_bytes(key[:8], "big") < self.config.fraction * 2**64
        return [name if chosen or name not in SIGNED else self.config.otherwise for name in self.explainers]

    def _row(self, name: str, reward: SequenceReward, main: Game, tokens: Game, value: float, key: bytes) -> Tensor:
        c, T, R = self.config, len(main.response), torch.tensor([value], dtype=torch.float64)
        ids_L = torch.tensor([*main.prompt, *main.response], dtype=torch.long)
        if name not in SIGNED:
            if name == "attention":
                share_T = reward.attention(ids_L, len(main.prompt)).double()[None]
            else:
                share_T = _at_end(T) if name == "final" else torch.ones((1, T))
            return shares(share_T, R, _valid(T))[0]
        generator = torch.Generator().manual_seed(int.from_bytes(key[8:15], "big"))
        budget = min(c.evaluations, c.evaluations_a_player * max(main.P, 1))
        if name == "prefix":
            known_T = reward.prefixes(ids_L, len(main.prompt)) if self._repeats == 1 else None
            amount_T = (main.scored_prefixes() if known_T is None else known_T.double().cpu()).diff()
        elif name == "lime":
            amount_T = spread(
                lime(main, main.P, budget, generator, width=c.lime_width, ridge=c.lime_ridge), main.player_T
            )
        elif name == "owen":
            amount_T = spread(
                permutation(tokens, tokens.P, budget, generator, self._blocks(main, tokens)), tokens.player_T
            )
        else:
            amount_T = spread(self._shapley(main, budget, generator), main.player_T)
        return token_credit(amount_T[None], R, _valid(T), c.mode, c.temperature)[0]

    def _shapley(self, main: Game, budget: int, generator: torch.Generator) -> Tensor:
        how = self.config.shapley
        if how == "exact" or (how == "auto" and main.P <= MOST_EXACT and 2**main.P <= budget):
            return exact(main, main.P)
        return (permutation if how == "permutation" else kernel)(main, main.P, budget, generator)

    def _blocks(self, main: Game, tokens: Game) -> Tensor:
        """The block of each token player: its player, or a span where tokens are the players."""
        if self.config.players == "token":
            return torch.arange(tokens.P) // self.config.span_tokens
        return main.player_T[: tokens.P]

    def _check(self, main: Game) -> int:
        """Score a response twice, the first few times; from the first difference on, scores are averages."""
        if self._repeats > 1 or self._checks == 0:
            return 0
        self._checks -= 1
        again = Game(main.score, main.prompt, main.response, torch.full_like(main.player_T, NOBODY))
        if abs(again.whole - main.whole) > WOBBLE * max(1.0, abs(main.whole)):
            self._repeats = self.config.repeats
            warnings.warn(
                f"the reward is not deterministic: one response scored {main.whole:g} and {again.whole:g}; from here "
                f"on every score is the mean of attribution.repeats={self._repeats}",
                stacklevel=2,
            )
        return again.calls


def _valid(T: int) -> Tensor:
    return torch.ones((1, T), dtype=torch.bool)


def _at_end(T: int) -> Tensor:
    share_T = torch.zeros((1, T), dtype=torch.float64)
    share_T[:, -1:] = 1.0
    return share_T
