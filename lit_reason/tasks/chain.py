"""Decode-and-chain: look symbols up, wander, add the values up. The middle of the trace is redundant, or not.

The prompt gives every symbol a value and asks for a sum; all additions are modulo `modulus`::

    given e3 a0 d4 c1 f2 b4 add c a e b
    <think>is c 1.  is a 0.  is e 3.  is b 4.            understanding: each operand is decoded
    wait d 4 + a 0 = 4.  hmm f 2 + c 1 = 3.  ...         exploration: 6 to 12 sums of two symbols
    so 1 + 0 = 1.  so 1 + 3 = 4.  so 4 + 4 = 3.</think> 3    convergence: the chain over the decoded values

(thoughts are separated by blank lines.) The exploration is correct but nothing after it uses it: at `tau = 0.5`
the edges that EPiC keeps hold all that the answer needs. With `used_share = p` the task changes: a share p of the
middle thoughts, those that start with "meanwhile", add further operands to a running total, and the convergence
starts from that total, so removing one of them leaves a gap.

A value stands right behind its symbol, in the prompt as one token with it: looking it up takes a single attention
step, which is what lets a model of 0.1 M parameters learn the task in a minute.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from typing import Any

from lit_reason.errors import UserError

CUES = ("wait", "but", "hmm", "alternatively")
HELD_OUT_SHARE = 8  # one assignment of values in this many is never trained on


@dataclass(frozen=True)
class ChainConfig:
    """Size of the problems.

    Args:
        symbols: symbols a, b, c, ... that the prompt gives values to.
        modulus: values lie in [0, modulus); guessing is right once in `modulus` times.
        links: additions in the convergence; `links + 1` symbols are decoded.
        middle_min: fewest exploration thoughts. At least `links + 3`, or EPiC at tau 0.5 cuts the edges.
        middle_max: most exploration thoughts.
        used_share: share p in [0, 1] of the exploration thoughts whose result the convergence uses.
    """

    symbols: int = 6
    modulus: int = 5
    links: int = 3
    middle_min: int = 6
    middle_max: int = 12
    used_share: float = 0.0

    def __post_init__(self) -> None:
        if not 2 <= self.symbols <= 26 or not 1 <= self.links < self.symbols or self.modulus < 2:
            raise UserError(
                f"chain: symbols {self.symbols}, links {self.links}, modulus {self.modulus}: "
                "2 to 26 symbols, fewer links than symbols, and a modulus of at least 2 are needed"
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
    def chance(self) -> float:
        """Accuracy of guessing: the sum of uniform values is uniform."""
        return 1 / self.modulus


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
        values = tuple(rng.randrange(config.modulus) for _ in range(config.symbols))
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


def answer(config: ChainConfig, problem: ChainProblem) -> int:
    """The sum of all operands, modulo `config.modulus`."""
    return sum(problem.value(s) for s in problem.operands + problem.extras) % config.modulus


def prompt(problem: ChainProblem) -> str:
    """What the user asks."""
    given = " ".join(f"{s}{problem.value(s)}" for s in problem.shown)
    then = f" then {' '.join(problem.extras)}" if problem.extras else ""
    return f"given {given} add {' '.join(problem.operands)}{then}"


def thoughts(config: ChainConfig, problem: ChainProblem, rng: random.Random) -> list[str]:
    """The reasoning: `links + 1` decodings, `problem.middle` explorations, `links` steps of the chain.

    Args:
        config: size of the problem.
        problem: the problem.
        rng: draws the exploration and its cue words.
    """
    total = problem.value(problem.operands[0])
    head = [f"is {s} {problem.value(s)}." for s in problem.operands]
    useful = set(rng.sample(range(problem.middle), len(problem.extras)))
    extras = iter(problem.extras)
    middle = []
    for place in range(problem.middle):
        if place in useful:
            symbol = next(extras)
            left = f"meanwhile {total} + {symbol} {problem.value(symbol)}"
            total = (total + problem.value(symbol)) % config.modulus
            middle.append(f"{left} = {total}.")
        else:
            a, b = rng.sample(config.letters, 2)
            result = (problem.value(a) + problem.value(b)) % config.modulus
            middle.append(f"{rng.choice(CUES)} {a} {problem.value(a)} + {b} {problem.value(b)} = {result}.")
    tail = []
    for symbol in problem.operands[1:]:
        before, total = total, (total + problem.value(symbol)) % config.modulus
        tail.append(f"so {before} + {problem.value(symbol)} = {total}.")
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
    solution = str(answer(config, problem))
    trace = "\n\n".join(thoughts(config, problem, rng))
    return {
        "messages": [
            {"role": "user", "content": prompt(problem)},
            {"role": "assistant", "content": f"<think>{trace}</think> {solution}"},
        ],
        "answer": solution,
    }


def words(config: ChainConfig) -> list[str]:
    """Every token text that can stand in a problem or its trace; blanks belong to the word behind them."""
    symbols = [f" {s}" for s in config.letters]
    numbers = [f" {v}" for v in range(config.modulus)]
    pairs = [s + str(v) for s in symbols for v in range(config.modulus)]
    starts = ["given", "is", "so", "meanwhile", *CUES]
    return ["\n\n", ".", *starts, " add", " then", " +", " =", *symbols, *numbers, *pairs]


def check(text: str, answer: str | None, metadata: dict[str, Any]) -> bool:
    """Whether a completion, or the part of it behind the thoughts, is exactly the answer.

    Args:
        text: `... </think> 3`, or ` 3` alone.
        answer: the reference, `3`.
        metadata: not used.
    """
    return answer is not None and text.rpartition("</think>")[2].split() == answer.split()
