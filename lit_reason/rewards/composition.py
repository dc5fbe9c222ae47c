"""What a dialogue is paid: rewards by name, each a plain callable with a weight, for its turns or for the whole.

A reward takes a `Dialogue` and returns one number for the whole, or a sequence with one number for each turn. Which of
the two it returns says where it is paid. It is looked up by the name that the recipe gives it, and under that name its
numbers stand in the ledger.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from lit_reason.errors import UserError
from lit_reason.plugins import load_function
from lit_reason.rewards.checkers import Verdict, get_checker
from lit_reason.rewards.dialogue import Dialogue
from lit_reason.rewards.tool_use import TOOL_USE

Reward = Callable[[Dialogue], float | Sequence[float]]
ENVIRONMENT = "environment"  # the name of what the environment itself pays


class RewardError(Exception):
    """A reward gave nothing that can be paid: the rollout is counted as failed and left out of the update."""


class Paid(NamedTuple):
    """Rewards by name.

    Args:
        turns: of each turn.
        outcome: of the whole.
    """

    turns: list[dict[str, float]]
    outcome: dict[str, float]


class Rewards:
    """The rewards of a recipe.

    Args:
        weights: weight of each reward by name: one of `TOOL_USE`, `environment` (what the environment pays itself),
            `checker:NAME` (1 for a right answer, by any checker that `get_checker` knows), or
            `package.module:function`. None pays what the environment pays.

    Raises:
        UserError: there is no such reward, or a weight is not finite.
    """

    def __init__(self, weights: Mapping[str, float] | None = None) -> None:
        self.weights = {ENVIRONMENT: 1.0} if weights is None else dict(weights)
        for name, weight in self.weights.items():
            if not math.isfinite(weight):
                raise UserError(f"rewards.{name} is {weight}; a weight must be a finite number")
        self._functions = {name: find_reward(name) for name in self.weights if name != ENVIRONMENT}

    def pay(self, dialogue: Dialogue, own: Paid) -> Paid:
        """What a dialogue is paid.

        Args:
            dialogue: the dialogue.
            own: what the environment pays.

        Returns:
            Every reward times its weight, under its name; those of the environment under names of their own.

        Raises:
            RewardError: a reward raised, or returned something else than finite numbers, one in all or one a turn.
        """
        turns: list[dict[str, float]] = [{} for _ in dialogue.turns]
        outcome: dict[str, float] = {}
        if (weight := self.weights.get(ENVIRONMENT)) is not None:
            for k, terms in enumerate(own.turns):
                turns[k] = {name: weight * _number(value, name, k) for name, value in terms.items()}
            outcome = {name: weight * _number(value, name) for name, value in own.outcome.items()}
        for name, function in self._functions.items():
            try:
                given = function(dialogue)
            except Exception as error:  # whatever a reward raises costs one rollout, and is counted
                raise RewardError(f"reward '{name}' raised {type(error).__name__}: {error}") from error
            values = _sequence(given)
            if values is None:
                outcome[name] = outcome.get(name, 0.0) + self.weights[name] * _number(given, name)
                continue
            if len(values) != len(turns):
                raise RewardError(f"reward '{name}' gave {len(values)} numbers for {len(turns)} turns")
            for k, (terms, value) in enumerate(zip(turns, values, strict=True)):
                terms[name] = terms.get(name, 0.0) + self.weights[name] * _number(value, name, k)
        return Paid(turns, outcome)


def find_reward(name: str) -> Reward:
    """The reward of a name.

    Args:
        name: one of `TOOL_USE`, `checker:NAME`, or `package.module:function`.

    Raises:
        UserError: there is no such reward.
    """
    if name in TOOL_USE:
        return TOOL_USE[name]
    if name.startswith("checker:"):
        return _by_checker(name.removeprefix("checker:"))
    return load_function(name, "a reward", (*TOOL_USE, ENVIRONMENT, "checker:numeric"))


def _by_checker(spec: str) -> Reward:
    checker = get_checker(spec)

    def right(dialogue: Dialogue) -> float:
        last, answer = dialogue.turns[-1], dialogue.task.get("answer")
        said = last.info.get("answer")
        verdict = checker(last.text if said is None else said, None if answer is None else str(answer), {})
        return float(verdict.correct)

    return right


def _sequence(given: Any) -> Sequence[Any] | None:
    """The value as a list where it is a sequence of any kind (list, array, tensor), else None."""
    if isinstance(given, (str, bytes, Mapping)):
        return None
    try:
        return list(given)
    except TypeError:
        return None


def _number(value: Any, name: str, turn: int | None = None) -> float:
    where = f"reward '{name}'" + ("" if turn is None else f" of turn {turn}")
    value = value.correct if isinstance(value, Verdict) else value
    if isinstance(value, (str, bytes)):
        raise RewardError(f"{where} is {value[:60]!r}; it must be a number")
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise RewardError(f"{where} is {str(value)[:60]}; it must be a number") from error
    if not math.isfinite(number):
        raise RewardError(f"{where} is {number}; it must be finite")
    return number
