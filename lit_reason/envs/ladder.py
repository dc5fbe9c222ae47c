"""A ladder of turns: on every rung a symbol is shown and one word is right for it; the outcome asks for all of them.

The smallest task in which credit matters: with K rungs and a reward for the whole alone, a policy that knows nothing
earns nothing; rewards of single rungs say where it went right. A coin adds noise that no policy can influence. In a
chained ladder a rung pays only after the first one went right, so the first turn's worth lies in what it makes
possible.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

from lit_reason.envs.environment import Environment, Message, Step
from lit_reason.errors import UserError


class Ladder(Environment):
    """K turns; on each a symbol is shown, and the policy answers with a word: its turn's first counts.

    Which word is right depends on the rung and the symbol, by a table drawn once from `table_seed`.

    Args:
        symbols: what may be shown.
        words: what may be answered.
        rungs: number of turns K.
        rung_reward: paid for a right answer.
        coin_reward: paid on every rung with probability one half, whatever the answer.
        outcome_reward: paid at the end when all answers were right.
        chained: rungs after the first pay only if the first was answered right.
        table_seed: seed of the table.
    """

    def __init__(
        self,
        symbols: Sequence[str] = ("c0", "c1", "c2", "c3"),
        words: Sequence[str] = ("a0", "a1", "a2", "a3", "a4", "a5"),
        rungs: int = 6,
        rung_reward: float = 0.7,
        coin_reward: float = 1.0,
        outcome_reward: float = 1.0,
        chained: bool = False,
        table_seed: int = 0,
    ) -> None:
        if rungs < 1 or not symbols or len(set(words)) < 2:
            raise UserError(f"a ladder needs a rung, a symbol and two words; it has {rungs}, {symbols} and {words}")
        self.symbols, self.words, self.rungs = tuple(symbols), tuple(words), rungs
        self.pays = {"right": rung_reward, "coin": coin_reward, "all_right": outcome_reward}
        self.chained = chained
        table = random.Random(f"table {table_seed}")
        self.right = [{s: table.choice(self.words) for s in self.symbols} for _ in range(rungs)]

    def task(self, index: int, seed: int) -> dict[str, Any]:
        """Symbols for all rungs."""
        rng = random.Random(f"{seed} {index}")
        return {"shown": [rng.choice(self.symbols) for _ in range(self.rungs)]}

    def reset(self, task: Mapping[str, Any], seed: int, rollout: int = 0) -> list[Message]:
        """Show the first symbol."""
        self.shown, self.rung = list(task["shown"]), 0
        self.hits: list[bool] = []
        self.coins = random.Random(f"{seed} {self.shown} {rollout}")
        return [{"role": "user", "content": self.shown[0]}]

    def expert(self, task: Mapping[str, Any]) -> list[str]:
        """The right word of every rung."""
        return [right[shown] for right, shown in zip(self.right, task["shown"], strict=True)]

    def step(self, action: str) -> Step:
        """Take the answer and show the next symbol."""
        right = action.split()[:1] == [self.right[self.rung][self.shown[self.rung]]]
        self.hits.append(right)
        paid = right and (not self.chained or self.hits[0])
        terms = {"right": self.pays["right"] * paid, "coin": self.pays["coin"] * (self.coins.random() < 0.5)}
        self.rung += 1
        over = self.rung == self.rungs
        return Step("" if over else self.shown[self.rung], sum(terms.values()), over, False, {"terms": terms})

    def outcome(self) -> dict[str, float]:
        """Paid when every rung was answered right."""
        return {"all_right": self.pays["all_right"] * (len(self.hits) == self.rungs and all(self.hits))}
