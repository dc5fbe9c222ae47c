"""The datum before tokens: a conversation, its messages, and the trace of thoughts inside one of them.

Every input format becomes a `Conversation` (data/reading); transforms such as condensation map a conversation to a
conversation (data/condensation); rendering turns it into a `TokenRow` (data/rendering).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Role = Literal["system", "user", "assistant", "tool", "text"]
ROLES: tuple[str, ...] = ("system", "user", "assistant", "tool", "text")

Path = tuple[str | int, ...]


@dataclass(frozen=True)
class Trace:
    """The thoughts kept from one reasoning trace, and where each stood in the full one.

    Attributes:
        thoughts: the kept thoughts in their original order. Each carries its own trailing separator, so that
            `"".join(thoughts)` is exactly the text between the think markers.
        origin: for each kept thought, its index in the full trace (strictly increasing).
        total: number of thoughts in the full trace; `origin` values lie in `[0, total)`.
    """

    thoughts: tuple[str, ...]
    origin: tuple[int, ...]
    total: int

    @property
    def text(self) -> str:
        """The trace as it stands between the markers."""
        return "".join(self.thoughts)

    @property
    def seams(self) -> tuple[int, ...]:
        """Positions `j >= 1` in `thoughts` whose predecessor in the full trace was removed."""
        return tuple(j for j in range(1, len(self.origin)) if self.origin[j] != self.origin[j - 1] + 1)


@dataclass(frozen=True)
class Message:
    """One turn of a conversation.

    Attributes:
        role: who speaks; `text` is a plain document that is trained whole and never goes through a chat template.
        content: the text as the record had it, think markers included when the record keeps them inline.
        reasoning: the reasoning of a record that keeps it in a field of its own; None otherwise.
        tool_calls: calls made by an assistant turn, in the `{"type": "function", "function": {...}}` shape.
        name: tool name of a `tool` turn, when known.
        tool_call_id: id that ties a `tool` turn to its call, when known.
        trained: whether the loss covers this turn (assistant and text turns only).
        trace: the segmented reasoning, once condense.py has looked at the turn; None before, or without one.
        truncated: the text was cut before its end, so no end token may follow it in training.
        content_path: keys that lead to the content inside the raw record, for writing a changed row back.
        reasoning_path: the same for the reasoning field.
    """

    role: Role
    content: str
    reasoning: str | None = None
    tool_calls: tuple[dict[str, Any], ...] = ()
    name: str | None = None
    tool_call_id: str | None = None
    trained: bool = False
    trace: Trace | None = None
    truncated: bool = False
    content_path: Path = ()
    reasoning_path: Path = ()


@dataclass(frozen=True)
class Conversation:
    """A record in the one shape that everything after the format adapters understands.

    Attributes:
        messages: the turns in order.
        row_id: stable name of the record, `<file name>:<line or index from 1>`.
        tools: JSON schemas of the tools offered to the assistant.
        answer: the reference answer for checkers, when the record has one.
        metadata: fields of the record that no adapter consumed (for custom checkers).
    """

    messages: tuple[Message, ...]
    row_id: str
    tools: tuple[dict[str, Any], ...] = ()
    answer: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
