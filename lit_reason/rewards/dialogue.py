"""A dialogue that is over, as rewards see it: what the model wrote, what it read then, and what the task was."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple


class Turn(NamedTuple):
    """One turn of the model and what followed.

    Args:
        text: what the model wrote, up to its stop string.
        observation: what the environment said to it.
        info: what else the environment knows about the turn; the model never saw it.
    """

    text: str
    observation: str
    info: Mapping[str, Any]


@dataclass(frozen=True)
class Dialogue:
    """A whole dialogue.

    Attributes:
        task: the row of the data that it was about.
        turns: in order, at least one.
        finished: the environment ended it; False when a limit cut it off.
    """

    task: Mapping[str, Any]
    turns: tuple[Turn, ...]
    finished: bool
