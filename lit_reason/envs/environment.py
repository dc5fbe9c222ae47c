"""What an environment is: it opens a dialogue, answers the model's turns, and says what turns and whole were worth."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from lit_reason.errors import UserError

Message = dict[str, str]  # role and content, as chat templates read them


class Step(NamedTuple):
    """What follows a turn of the model, in Gymnasium's order.

    Args:
        observation: text that the model reads next; empty when the dialogue is over.
        reward: reward of this turn alone.
        terminated: the dialogue is over by its own rules.
        truncated: it is over because of a limit of the environment.
        info: facts the model never sees; `terms` holds the turn's rewards by name.
    """

    observation: str
    reward: float
    terminated: bool
    truncated: bool
    info: dict[str, Any]


class Environment(ABC):
    """One dialogue at a time. Rollouts of a group each get an environment of their own.

    Whatever a *tool* does wrong is an observation for the model. An exception that leaves `reset`, `step` or `outcome`
    means that the environment itself failed; the rollout is counted as such and excluded.

    Attributes:
        stops: texts that end a turn of the model.
    """

    stops: tuple[str, ...] = ()

    def task(self, index: int, seed: int) -> dict[str, Any]:
        """Make up a task; equal numbers give equal tasks.

        Args:
            index: number of the task, from 0.
            seed: of the whole set.

        Raises:
            UserError: this environment's tasks come from a file.
        """
        raise UserError(f"{type(self).__name__} makes up no tasks: name a file of them in data.train_file")

    def check(self, task: Mapping[str, Any]) -> None:  # noqa: B027 (most environments take what they are given)
        """Refuse a task from a file before anything is trained.

        Args:
            task: a row of the training data.

        Raises:
            UserError: this task cannot be played; the message says why.
        """

    @abstractmethod
    def reset(self, task: Mapping[str, Any], seed: int, rollout: int = 0) -> list[Message]:
        """Begin a dialogue.

        Args:
            task: a row of the training data.
            seed: of whatever the environment draws; equal for all rollouts of a group.
            rollout: number of the rollout in its group, for noise that must differ between them.

        Returns:
            The messages that come before the model's first turn.
        """

    @abstractmethod
    def step(self, action: str) -> Step:
        """Answer one turn.

        Args:
            action: the model's turn as text, up to its stop string.
        """

    @abstractmethod
    def outcome(self) -> dict[str, float]:
        """What the dialogue as a whole was worth, by name of the reward; asked once, when it is over or cut off."""

    def expert(self, task: Mapping[str, Any]) -> Iterable[str]:
        """The turns of one who knows how it is done, for demonstrations to begin with.

        Args:
            task: a row of the training data, begun by `reset`.

        Raises:
            UserError: this environment has no expert.
        """
        raise UserError(f"{type(self).__name__} has no expert: write demonstrations yourself, as rows of messages")

    def close(self) -> None:  # noqa: B027 (most environments hold nothing)
        """Free what the environment holds."""
