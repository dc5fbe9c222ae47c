"""Records to conversations and back: the one place that knows how data sets spell their rows.

| format | fields |
|---|---|
| `preference` | `chosen` and `rejected`, beside a conversation or a prompt |
| `sharegpt` | `conversations` of `from`/`value`: human, gpt, system, function_call, observation, tool |
| `messages` | `messages` (or `conversations`, `conversation`) of `role`/`content`; tool calls and results |
| `alpaca` | `instruction`, optional `input` and `history`; `output` |
| `openr1` | `problem` and a list `generations` |
| `prompt_completion` | `prompt` (text or turns) with `completion`, `response`, `output` or `answer` |
| `question_answer` | `question` or `problem` with `solution` and the reference `answer`, or `answer` alone |
| `text` | `text`: a plain document, trained whole |

`auto` takes the first of these whose fields the row has; a null field counts as absent.

- Of a preference pair, `chosen` becomes the assistant's turn, the only trained one unless `chosen` holds a
  whole conversation; `rejected` stays in the metadata.
- Of several generations, the first one that the row marks as complete and correct is taken.
- `query` or `input` may stand for `prompt` when there is a completion.
- In all formats but `text`, `system` (or `system_prompt`) opens the conversation and `tools` (or `functions`)
  lists tool schemas.
- Reasoning in a field of its own (`reasoning_content`, `reasoning`, `thinking`, `thought`, `cot`,
  `model_reasoning`) is read from each assistant turn; in the formats without a list of turns, from the row. A
  list of strings there is a trace that is already split: `Message.trace` holds all its thoughts and
  `Message.reasoning` their text.
- The reference answer is the first of `answer`, `final_answer`, `reference_answer`, `expected_answer`,
  `ground_truth` that is not itself the assistant's text. Where `answer` is that text, the reference is what
  stands after `####` (GSM8K), or the whole of an answer of one line.
- Fields nobody used are in `Conversation.metadata`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from lit_reason.data.conversation import Conversation, Message, Path
from lit_reason.data.reading.adapters import (
    FORMATS,
    PROMPTS,
    QUESTIONS,
    SYSTEM_KEYS,
    TOOL_KEYS,
    TURN_LISTS,
    Record,
    last_assistant,
    present,
)
from lit_reason.data.reading.turns import presplit_trace, read_tools, spell, text_of
from lit_reason.errors import EmptyMask, RowError, UserError, did_you_mean


def detect_format(record: Record) -> str:
    """The name of the first format in `FORMATS` whose keys the record has.

    Args:
        record: one row.

    Returns:
        A key of `FORMATS`.

    Raises:
        RowError: no format has such keys.
    """
    for name, adapter in FORMATS.items():
        if adapter.matches(record):
            return name
    known = (*TURN_LISTS, "instruction", *PROMPTS, *QUESTIONS, "chosen", "text")
    near = next((n for n in (did_you_mean(str(k), known) for k in record) if n), "")
    shown = ", ".join(repr(str(k)[:40]) for k in list(record)[:8]) or "none"
    raise RowError(f"unknown format: cannot tell it from the row's fields ({shown}){near}")


def to_conversation(
    record: Record,
    row_id: str,
    *,
    format: str = "auto",
    train_on: str = "assistant",
    need_assistant: bool = True,
) -> Conversation:
    """One row as a conversation. Turns stay in the order of the source; none is merged or dropped.

    Args:
        record: the row as read from its file.
        row_id: the row's name.
        format: a key of `FORMATS`, or `auto`.
        train_on: `assistant` marks every assistant turn as trained, `last` only the last one. A turn whose
            own `weight` is 0 is never trained.
        need_assistant: refuse rows without something to train on. Prediction and evaluation pass False.

    Returns:
        The conversation; `write_back` with the same record undoes it.

    Raises:
        RowError: the row cannot be used.
        UserError: an unknown `format` or `train_on`.
    """
    if format != "auto" and format not in FORMATS:
        allowed = ["auto", *FORMATS]
        raise UserError(
            f"unknown data format '{format}': allowed are {', '.join(allowed)}{did_you_mean(format, allowed)}"
        )
    if train_on not in ("assistant", "last"):
        near = did_you_mean(train_on, ("assistant", "last"))
        raise UserError(f"unknown train_on '{train_on}': allowed are assistant, last{near}")
    if not isinstance(record, dict):
        raise RowError(f"not an object: a row must be a JSON object, got {type(record).__name__}")
    name = detect_format(record) if format == "auto" else format
    reading = FORMATS[name].read(record)
    messages, used = list(reading.messages), set(reading.used)
    tools: tuple[dict[str, Any], ...] = ()
    if name != "text":
        system, offered = present(record, SYSTEM_KEYS), present(record, TOOL_KEYS)
        if system and text_of(record[system], (system,)).strip():
            messages.insert(0, Message("system", text_of(record[system], (system,)), content_path=(system,)))
        tools = read_tools(record[offered], (offered,)) if offered else ()
        used |= {key for key in (system, offered) if key}
    if train_on == "last":
        last = last_assistant(messages)
        messages = [replace(m, trained=m.trained and (m.role == "text" or i == last)) for i, m in enumerate(messages)]
    if need_assistant:
        _check_trainable(messages, f"{reading.lacking} (read as {name})")
    metadata = {key: value for key, value in record.items() if key not in used}
    return Conversation(tuple(messages), row_id, tools=tools, answer=reading.answer, metadata=metadata)


def _check_trainable(messages: list[Message], lacking: str) -> None:
    """Raises RowError unless there is a turn to train on and every such turn says something."""
    if not any(m.role in ("assistant", "text") for m in messages):
        raise RowError(f"no assistant turn: {lacking}")
    if not any(m.trained for m in messages):
        raise EmptyMask("no trained turn: the weight of every turn that would be trained is 0")
    for m in messages:
        if m.trained and not (m.content.strip() or m.tool_calls or (m.reasoning or "").strip()):
            where = f" at {spell(m.content_path)}" if m.content_path else ""
            raise RowError(f"empty {m.role} turn: there is nothing to train on{where}")


def write_back(record: Record, conversation: Conversation) -> Record:
    """The row with each message's content and reasoning in the field it came from.

    What did not change keeps its shape. A changed text is written as a string, or as one text part where the
    row has parts; a changed list of thoughts as the list of the kept ones. Messages without a path, whose
    text was put together from several fields, are left alone.

    Args:
        record: the row `to_conversation` read; it is not changed.
        conversation: the conversation, its texts changed or not, its messages in the same order.

    Returns:
        A new row. Fields nobody wrote to are shared with `record`.
    """
    row = record
    for message in conversation.messages:
        if message.reasoning_path:
            row = _put(row, message.reasoning_path, partial(_new_reasoning, message))
        if message.content_path:
            row = _put(row, message.content_path, partial(_new_content, message))
    return dict(row)


def _put(node: Any, path: Path, change: Callable[[Any], Any]) -> Any:
    """A copy of the containers along the path, with the value at its end changed."""
    if not path:
        return change(node)
    key: Any = path[0]
    old = node.get(key) if isinstance(node, dict) else node[key]
    new = _put(old, path[1:], change)
    if new is old:
        return node
    copy: Any = dict(node) if isinstance(node, dict) else list(node)
    copy[key] = new
    return copy


def _new_content(message: Message, old: Any) -> Any:
    if text_of(old, message.content_path, numbers=True) == message.content:
        return old
    if isinstance(old, list):
        kind = next((p.get("type", "text") for p in old if isinstance(p, dict)), "text")
        return [{"type": kind, "text": message.content}]
    return message.content


def _new_reasoning(message: Message, old: Any) -> Any:
    text = message.reasoning or ""
    if not isinstance(old, list):
        return old if old == text else text
    if presplit_trace(old).text == text:
        return old
    if message.trace is None or message.trace.text != text:
        return [text] if text else []
    # A kept thought goes back as the row had it, without the separator that reading added.
    source = dict(enumerate(old))
    kept = zip(message.trace.thoughts, message.trace.origin, strict=True)
    return [s if (s := source.get(i, "")).strip() == t.strip() else t for t, i in kept]
