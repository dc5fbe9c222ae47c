"""Held-out problems as prompts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class EvalPrompt:
    """One problem to generate for.

    Attributes:
        ids: token ids up to where the answer begins, generation prompt included.
        row_id: name of the record.
        text: the prompt as a person reads it.
        answer: the reference answer, when the record has one.
        metadata: further fields of the record, for custom checkers.
    """

    ids: list[int]
    row_id: str
    text: str
    answer: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
