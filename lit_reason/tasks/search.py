"""Essential search: find the one pair with a wanted sum by trying pairs in order. The middle cannot be skipped.

The prompt gives every symbol a value, and a target::

    given c7 a2 f9 b4 e0 d6 target10
    <think>is c 7.  is a 2.  is f 9.  is b 4.  is e 0.  is d 6.      understanding: the values, in prompt order
    wait c 7 + a 2 = 9 want 10 no.  but c 7 + f 9 = 16 want 10 no ... exploration: pairs in order, each a miss
    hmm b 4 + d 6 = 10 want 10 yes.  so b d.</think> b d             convergence: the hit, and the answer

(thoughts are separated by blank lines.) Which pair comes next follows from the pair before; which pair hits is only
known after all the tries, and a try does not show how it ends before its sum stands there. A student trained on the
edges alone must guess the hit. As in `chain`, a value is one token with what it belongs to, and what is compared stands
side by side: a model of 0.1 M parameters then learns the whole search within a minute.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from lit_reason.errors import UserError
from lit_reason.tasks.chain import CUES, is_held_out


@dataclass(frozen=True)
class SearchConfig:
    """Size of the problems.

    Args:
        symbols: symbols a, b, c, ... that the prompt gives values to.
        values: a symbol's value is one of 0 to `values - 1`.
        misses_min: fewest pairs tried in vain before the hit.
        misses_max: most pairs tried in vain; None: all but the last pair.
        shuffle: show the symbols in random order, which is the order of the search; else in alphabetical order, so
            that the search itself need not be read from the prompt and small students learn it sooner.
    """

    symbols: int = 6
    values: int = 10
    misses_min: int = 4
    misses_max: int | None = None
    shuffle: bool = True

    def __post_init__(self) -> None:
        pairs = self.symbols * (self.symbols - 1) // 2
        most = pairs - 1 if self.misses_max is None else self.misses_max
        if not 2 <= self.symbols <= 26 or self.values < 2 or not 0 <= self.misses_min <= most < pairs:
            raise UserError(
                f"search: symbols {self.symbols}, values {self.values}, misses {self.misses_min} to {most}: "
                "2 to 26 symbols, at least 2 values, and fewer misses than pairs are needed"
            )

    @property
    def letters(self) -> str:
        """The symbols."""
        return "abcdefghijklmnopqrstuvwxyz"[: self.symbols]

    @property
    def hits(self) -> range:
        """Numbers of the pairs, in search order, that may hit."""
        pairs = self.symbols * (self.symbols - 1) // 2
        return range(self.misses_min, pairs if self.misses_max is None else self.misses_max + 1)

    @property
    def chance(self) -> float:
        """Accuracy of guessing one of the pairs that may hit."""
        return 1 / len(self.hits)


@dataclass(frozen=True)
class SearchProblem:
    """One problem; exactly one pair hits.

    Attributes:
        values: value of each symbol, in alphabetical order.
        shown: the symbols in the order of the prompt, which is the order of the search.
        target: the wanted sum.
    """

    values: tuple[int, ...]
    shown: str
    target: int

    def value(self, symbol: str) -> int:
        """Value of a symbol."""
        return self.values[ord(symbol) - ord("a")]


def hits(problem: SearchProblem) -> list[int]:
    """Numbers of the pairs, in search order, whose sum is the target."""
    sums = (problem.value(a) + problem.value(b) for a, b in combinations(problem.shown, 2))
    return [n for n, total in enumerate(sums) if total == problem.target]


def draw(config: SearchConfig, rng: random.Random, *, held_out: bool) -> SearchProblem:
    """A random problem with exactly one hit, its number uniform over those that are late enough.

    Args:
        config: its size.
        rng: source of randomness.
        held_out: draw from the assignments that training never sees, or from the others.
    """
    pairs = list(combinations(range(config.symbols), 2))
    wanted = rng.choice(config.hits)
    while True:
        values = tuple(rng.randrange(config.values) for _ in range(config.symbols))
        if is_held_out(values) != held_out:
            continue
        shown = list(config.letters)
        if config.shuffle:
            rng.shuffle(shown)
        a, b = (shown[place] for place in pairs[wanted])
        target = values[ord(a) - ord("a")] + values[ord(b) - ord("a")]
        problem = SearchProblem(values, "".join(shown), target)
        if hits(problem) == [wanted]:
            return problem


def answer(problem: SearchProblem) -> str:
    """The two symbols of the hit, in the order of the prompt."""
    (hit,) = hits(problem)
    return " ".join(list(combinations(problem.shown, 2))[hit])


def prompt(problem: SearchProblem) -> str:
    """What the user asks."""
    given = " ".join(f"{s}{problem.value(s)}" for s in problem.shown)
    return f"given {given} target{problem.target}"


def thoughts(problem: SearchProblem, rng: random.Random) -> list[str]:
    """The reasoning: one decoding a symbol, one thought a miss, the hit, and the answer.

    Args:
        problem: the problem.
        rng: draws the cue words.
    """
    pairs = list(combinations(problem.shown, 2))
    (hit,) = hits(problem)

    def tried(pair: tuple[str, str]) -> str:
        a, b = pair
        total = problem.value(a) + problem.value(b)
        return f"{a} {problem.value(a)} + {b} {problem.value(b)} = {total} want {problem.target}"

    head = [f"is {s} {problem.value(s)}." for s in problem.shown]
    middle = [f"{rng.choice(CUES)} {tried(pair)} no." for pair in pairs[:hit]]
    return [*head, *middle, f"{rng.choice(CUES)} {tried(pairs[hit])} yes.", f"so {' '.join(pairs[hit])}."]


def record(config: SearchConfig, seed: int, index: int, *, held_out: bool) -> dict[str, Any]:
    """Problem number `index` of a seed, worked out, as a row in messages format.

    Args:
        config: size of the problems.
        seed: seed of the set.
        index: number in the set; the same (seed, index, side) always gives the same row.
        held_out: from the held-out side.
    """
    rng = random.Random(f"search/{seed}/{'held out' if held_out else 'train'}/{index}")
    problem = draw(config, rng, held_out=held_out)
    solution = answer(problem)
    trace = "\n\n".join(thoughts(problem, rng))
    return {
        "messages": [
            {"role": "user", "content": prompt(problem)},
            {"role": "assistant", "content": f"<think>{trace}</think> {solution}"},
        ],
        "answer": solution,
    }


def words(config: SearchConfig) -> list[str]:
    """Every token text that can stand in a problem or its trace; blanks belong to the word behind them."""
    symbols = [f" {s}" for s in config.letters]
    numbers = [f" {v}" for v in range(2 * config.values - 1)]
    pairs = [s + str(v) for s in symbols for v in range(config.values)]
    targets = [f" target{v}" for v in range(2 * config.values - 1)]
    return [
        "\n\n",
        ".",
        "given",
        "is",
        "so",
        *CUES,
        *targets,
        " want",
        " no",
        " yes",
        " +",
        " =",
        *symbols,
        *numbers,
        *pairs,
    ]


def check(text: str, answer: str | None, metadata: dict[str, Any]) -> bool:
    """Whether a completion, or the part of it behind the thoughts, names the two symbols, in either order.

    Args:
        text: `... </think> b d`, or ` b d` alone.
        answer: the reference, `b d`.
        metadata: not used.
    """
    return answer is not None and sorted(text.rpartition("</think>")[2].split()) == sorted(answer.split())
