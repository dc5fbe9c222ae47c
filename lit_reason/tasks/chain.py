"""Decode-and-chain: look symbols up, wander, add the values up. The middle of the trace is redundant, or not.

The prompt gives every symbol a value and asks for the sum of some of them::

    given e3 a0 d4 c1 f2 b4 add first c second a third e fourth b
    <think>decode first c 1.  decode second a 0.  decode third e 3.  decode fourth b 4.     understanding
    wait d 4 + a 0 = 4.  hmm f 2 + c 1 = 3.  ...                                              exploration
    so first 1 + second 0 = 1.  so 1 + third 3 = 4.  so 4 + fourth 4 = 8.</think> 8           convergence

(thoughts are separated by blank lines.) The exploration, 6 to 12 sums of two symbols, is correct, but nothing after
it uses it: at `tau = 0.5` the edges that EPiC keeps hold all that the answer needs. With `used_share = p` the task
changes: a share p of the middle thoughts, those that start with "meanwhile", add further operands to a running total,
and the convergence starts from that total, so removing one of them leaves a gap.

Three things let a model of 0.1 M parameters learn this within a minute. A value stands right behind its symbol, in the
prompt as one token with it, so that looking it up takes a single attention step. Operands have names (first, second,
...), so that fetching one is a matter of equal words. Sums are plain: half of a sum modulo a number says nothing about
it, which leaves nothing to learn from until both operands are known, and some seeds then wait for very long.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from dataclasses import dataclass
from typing import Any

from lit_reason.errors import UserError

CUES = ("wait", "but", "hmm", "alternatively")
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")
HELD_OUT_SHARE = 8  # one assignment of values in this many is never trained on


@dataclass(frozen=True)
class ChainConfig:
    """Size of the problems.

    Args:
        symbols: symbols a, b, c, ... that the prompt gives values to.
        values: a symbol's value is one of 0 to `values - 1`.
        links: additions in the convergence; `links + 1` symbols are decoded.
        middle_min: fewest exploration thoughts. At least `links + 3`, or EPiC at tau 0.5 cuts the edges.
        middle_max: most exploration thoughts.
        used_share: share p in [0, 1] of the exploration thoughts whose result the convergence uses.
    """

    symbols: int = 6
    values: int = 5
    links: int = 3
    middle_min: int = 6
    middle_max: int = 12
    used_share: float = 0.0

    def __post_init__(self) -> None:
        most = min(self.symbols, len(ORDINALS)) - 1
        if not 2 <= self.symbols <= 26 or not 1 <= self.links <= most or self.values < 2:
            raise UserError(
                f"chain: symbols {self.symbols}, values {self.values}, links {self.links}: needed are 2 to 26 "
                f"symbols, at least 2 values, and 1 to {len(ORDINALS) - 1} links, fewer than symbols"
            )
        if not 0 <= self.middle_min <= self.middle_max or not 0 <= self.used_share <= 1:
            raise UserError(
                f"chain: middle {self.middle_min} to {self.middle_max}, used_share {self.used_share}: "
                "0 <= middle_min <= middle_max and a share in [0, 1] are needed"
            )

    @property
    def letters(self) -> str:
        """The symbols."""
        return "abcdefghijklmnopqrstuvwxyz"[: self.symbols]

    @property
    def largest(self) -> int:
        """The largest sum that can occur."""
        return (self.values - 1) * (self.links + 1 + round(self.used_share * self.middle_max))

    @property
    def chance(self) -> float:
        """Accuracy of always guessing the most common answer, a sum of `links + 1` uniform values.

        Operands added in the middle (`used_share`) spread the answers more, and make it smaller than this.
        """
        ways = Counter({0: 1})
        for _ in range(self.links + 1):
            ways = sum((Counter({t + v: n for t, n in ways.items()}) for v in range(self.values)), Counter())
        return max(ways.values()) / ways.total()


@dataclass(frozen=True)
class ChainProblem:
    """One problem.

    Attributes:
        values: value of each symbol, in alphabetical order.
        shown: the symbols in the order of the prompt.
        operands: the `links + 1` symbols to decode and add, all different.
        extras: symbols that the middle adds: `used_share` of its length, each all symbols once before any again.
        middle: number of exploration thoughts, at least `len(extras)`.
    """

    values: tuple[int, ...]
    shown: str
    operands: str
    extras: str
    middle: int

    def value(self, symbol: str) -> int:
        """Value of a symbol."""
        return self.values[ord(symbol) - ord("a")]


def is_held_out(values: tuple[int, ...]) -> bool:
    """Whether problems with this assignment of values belong to the held-out side, whatever the seed."""
    return hashlib.sha256(bytes(values)).digest()[0] % HELD_OUT_SHARE == 0


def draw(config: ChainConfig, rng: random.Random, *, held_out: bool) -> ChainProblem:
    """A random problem.

    Args:
        config: its size.
        rng: source of randomness.
        held_out: draw from the assignments that training never sees, or from the others.
    """
    while True:
        values = tuple(rng.randrange(config.values) for _ in range(config.symbols))
        if is_held_out(values) == held_out:
            break
    shown, letters = list(config.letters), config.letters
    rng.shuffle(shown)
    operands = "".join(rng.sample(letters, config.links + 1))
    middle = rng.randint(config.middle_min, config.middle_max)
    used = round(config.used_share * middle)
    # Whole rounds through the symbols: a symbol comes again only after all the others.
    rounds = ("".join(rng.sample(letters, config.symbols)) for _ in range(-(-used // config.symbols)))
    return ChainProblem(values, "".join(shown), operands, "".join(rounds)[:used], middle)


def answer(problem: ChainProblem) -> int:
    """The sum of all operands."""
    return sum(problem.value(s) for s in problem.operands + problem.extras)


def prompt(problem: ChainProblem) -> str:
    """What the user asks."""
    given = " ".join(f"{s}{problem.value(s)}" for s in problem.shown)
    then = f" then {' '.join(problem.extras)}" if problem.extras else ""
    named = " ".join(f"{name} {s}" for name, s in zip(ORDINALS, problem.operands, strict=False))
    return f"given {given} add {named}{then}"


def thoughts(config: ChainConfig, problem: ChainProblem, rng: random.Random) -> list[str]:
    """The reasoning: `links + 1` decodings, `problem.middle` explorations, `links` steps of the chain.

    Args:
        config: size of the problem.
        problem: the problem.
        rng: draws the exploration and its cue words.
    """
    value = problem.value
    named = list(zip(ORDINALS, problem.operands, strict=False))
    head = [f"decode {name} {s} {value(s)}." for name, s in named]
    useful = set(rng.sample(range(problem.middle), len(problem.extras)))
    extras = iter(problem.extras)
    total = value(problem.operands[0])
    so_far = f"first {total}"  # how the running total is written: by name until something was added to it
    middle = []
    for place in range(problem.middle):
        if place in useful:
            symbol = next(extras)
            total += value(symbol)
            middle.append(f"meanwhile {so_far} + {symbol} {value(symbol)} = {total}.")
            so_far = str(total)
        else:
            a, b = rng.sample(config.letters, 2)
            middle.append(f"{rng.choice(CUES)} {a} {value(a)} + {b} {value(b)} = {value(a) + value(b)}.")
    tail = []
    for name, symbol in named[1:]:
        total += value(symbol)
        tail.append(f"so {so_far} + {name} {value(symbol)} = {total}.")
        so_far = str(total)
    return head + middle + tail


def record(config: ChainConfig, seed: int, index: int, *, held_out: bool) -> dict[str, Any]:
    """Problem number `index` of a seed, worked out, as a row in messages format.

    Args:
        config: size of the problems.
        seed: seed of the set.
        index: number in the set; the same (seed, index, side) always gives the same row.
        held_out: from the held-out side.
    """
    rng = random.Random(f"chain/{seed}/{'held out' if held_out else 'train'}/{index}")
    problem = draw(config, rng, held_out=held_out)
    solution = str(answer(problem))
    trace = "\n\n".join(thoughts(config, problem, rng))
    return {
        "messages": [
            {"role": "user", "content": prompt(problem)},
            {"role": "assistant", "content": f"<think>{trace}</think> {solution}"},
        ],
        "answer": solution,
    }


def styled(config: ChainConfig, seed: int, index: int) -> dict[str, Any]:
    """A trace as a labelled text: `wandering` as it is, or `direct` without its exploration.

    Args:
        config: size of the problems.
        seed: seed of the set.
        index: number in the set; even ones are direct.
    """
    rng = random.Random(f"chain/{seed}/styled/{index}")
    steps = thoughts(config, draw(config, rng, held_out=False), rng)
    label = "wandering" if index % 2 else "direct"
    kept = [step for step in steps if label == "wandering" or step.startswith(("decode", "so"))]
    return {"text": "\n\n".join(kept), "label": label}


def words(config: ChainConfig) -> list[str]:
    """Every token text that can stand in a problem or its trace; blanks belong to the word behind them."""
    symbols = [f" {s}" for s in config.letters]
    numbers = [f" {n}" for n in range(max(config.largest, 2 * (config.values - 1)) + 1)]
    pairs = [s + str(v) for s in symbols for v in range(config.values)]
    names = [f" {name}" for name in ORDINALS[: config.links + 1]]
    starts = ["given", "decode", "so", "meanwhile", *CUES]
    return ["\n\n", ".", *starts, " add", " then", " +", " =", *names, *symbols, *numbers, *pairs]


def check(text: str, answer: str | None, metadata: dict[str, Any]) -> bool:
    """Whether a completion, or the part of it behind the thoughts, is exactly the answer.

    Args:
        text: `... </think> 3`, or ` 3` alone.
        answer: the reference, `3`.
        metadata: not used.
    """
    return answer is not None and text.rpartition("</think>")[2].split() == answer.split()
