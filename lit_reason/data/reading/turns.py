"""One turn of a record, in any of the spellings found in the wild, as a `Message`.

Shared by the adapters in data/reading/formats.py. Every problem is a `RowError` that says where in the row it lies
(`messages[2].content`), so that the quarantine file can be read without opening the data.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from lit_reason.data.conversation import Message, Path, Role, Trace
from lit_reason.errors import RowError, did_you_mean

# Spellings of the roles. A function_call turn is an assistant turn whose text is the call itself.
CALL_ROLES = ("function_call", "tool_call")
ROLE_NAMES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "tool_response": "tool",
}
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking", "thought", "cot", "model_reasoning")
THOUGHT_SEPARATOR = "\n\n"


def spell(path: Path) -> str:
    """The path as a person would write it: `("messages", 2, "content")` is `messages[2].content`."""
    text = ""
    for key in path:
        text += f"[{key}]" if isinstance(key, int) else f".{key}" if text else str(key)
    return text


def is_missing(value: Any) -> bool:
    """Whether a field counts as absent: null, or the NaN that table tools write for null."""
    return value is None or (isinstance(value, float) and value != value)


def text_of(value: Any, path: Path, *, numbers: bool = False) -> str:
    """The text of a field: a string, or a list of text parts, which are joined without anything between them.

    Args:
        value: the field; a missing one is the empty text.
        path: where it stands, for the error.
        numbers: accept a number as its own text.

    Returns:
        The text.

    Raises:
        RowError: the field is something else.
    """
    if isinstance(value, str):
        return value
    if is_missing(value):
        return ""
    if isinstance(value, list):
        return "".join(_part_text(part, (*path, index)) for index, part in enumerate(value))
    if numbers and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    raise RowError(f"wrong type: {spell(path)} must be text, got {type(value).__name__}")


def _part_text(part: Any, path: Path) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, Mapping):
        raise RowError(f"wrong type: {spell(path)} must be a text part, got {type(part).__name__}")
    kind = part.get("type", "text")
    if kind not in ("text", "input_text", "output_text"):
        raise RowError(f"not text: {spell(path)} is a part of type {kind!r}; only text parts can be trained on")
    if not isinstance(part.get("text"), str):
        raise RowError(f"wrong type: {spell((*path, 'text'))} must be text")
    return part["text"]


def presplit_trace(thoughts: Sequence[str]) -> Trace:
    """The trace of a row that holds its thoughts as a list.

    Every thought but the last gets a blank line after it, unless it ends in a newline of its own, so that the
    joined thoughts read as one text.

    Args:
        thoughts: the thoughts in order.

    Returns:
        The full trace: nothing removed yet.
    """
    last = len(thoughts) - 1
    parts = tuple(t if i == last or t.endswith("\n") else t + THOUGHT_SEPARATOR for i, t in enumerate(thoughts))
    return Trace(thoughts=parts, origin=tuple(range(len(parts))), total=len(parts))


def read_reasoning(holder: Mapping[str, Any], at: Path) -> tuple[str | None, Trace | None, Path]:
    """The reasoning kept in a field of its own, looked up under `REASONING_KEYS` in that order.

    A list of strings is a trace that is already split: the text is its thoughts joined by blank lines, and
    the trace holds them one by one.

    Args:
        holder: the row or the turn that may have such a field.
        at: where `holder` stands in the row.

    Returns:
        Text, trace and path; `(None, None, ())` where there is no reasoning.

    Raises:
        RowError: the field is neither text nor a list of strings.
    """
    for key in REASONING_KEYS:
        value = holder.get(key)
        # Some public sets carry a `reasoning` column that only says whether the row has any.
        if is_missing(value) or isinstance(value, bool) or value in ("", [], "on", "off"):
            continue
        path = (*at, key)
        if isinstance(value, str):
            return value, None, path
        if isinstance(value, list) and all(isinstance(t, str) for t in value):
            trace = presplit_trace(value)
            return trace.text, trace, path
        raise RowError(f"wrong type: {spell(path)} must be text or a list of texts, got {type(value).__name__}")
    return None, None, ()


def _parsed(value: Any, path: Path) -> Any:
    """A field that may be JSON inside a string."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise RowError(f"not JSON inside text: {spell(path)}: {error}") from None


def read_tool_calls(value: Any, path: Path) -> tuple[dict[str, Any], ...]:
    """Calls in the shape chat templates expect.

    Args:
        value: one call or a list of calls, or JSON text of either; a call is `{"name", "arguments"}`, bare or
            under `function`, and the arguments are an object or JSON text of one.
        path: where it stands.

    Returns:
        For each call `{"type": "function", "function": {"name": str, "arguments": dict}}`, with its `id` if
        known.

    Raises:
        RowError: a call without a name, or arguments that are no JSON object.
    """
    if is_missing(value) or value == "":
        return ()
    parsed = _parsed(value, path)
    calls = []
    for index, call in enumerate(parsed if isinstance(parsed, list) else [parsed]):
        where = (*path, index) if isinstance(parsed, list) else path
        inner = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str) or not inner["name"]:
            raise RowError(f"bad tool call: {spell(where)} has no function name")
        arguments = inner.get("arguments")
        arguments = {} if is_missing(arguments) or arguments == "" else arguments
        arguments = _parsed(arguments, (*where, "arguments"))
        if not isinstance(arguments, dict):
            raise RowError(f"bad tool call: the arguments of {spell(where)} must be a JSON object")
        named = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
        calls.append({**named, "type": "function", "function": {"name": inner["name"], "arguments": arguments}})
    return tuple(calls)


def read_tools(value: Any, path: Path) -> tuple[dict[str, Any], ...]:
    """Tool schemas in the `{"type": "function", "function": {...}}` shape.

    Args:
        value: a list of schemas, bare or wrapped, or JSON text of it or of its items; missing or blank is
            none.
        path: where it stands.

    Returns:
        The schemas.

    Raises:
        RowError: not a list, or a schema without a name.
    """
    if is_missing(value) or (isinstance(value, str) and not value.strip()):
        return ()
    items = _parsed(value, path)
    if not isinstance(items, list):
        raise RowError(f"wrong type: {spell(path)} must be a list of tool schemas, got {type(items).__name__}")
    tools = []
    for index, item in enumerate(items):
        schema = _parsed(item, (*path, index))
        inner = schema.get("function", schema) if isinstance(schema, dict) else None
        if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
            raise RowError(f"bad tool schema: {spell((*path, index))} has no name")
        tools.append(schema if inner is not schema else {"type": "function", "function": schema})
    return tuple(tools)


def read_turn(turn: Any, at: Path, speaker: str, text: str) -> Message:
    """One turn as a message.

    Args:
        turn: the raw turn.
        at: where it stands in the row.
        speaker: key of the role, `role` or `from`.
        text: key of the content, `content` or `value`.

    Returns:
        The message; assistant turns come back as trained unless their `weight` is 0.

    Raises:
        RowError: not an object, an unknown role, or a field of the wrong type.
    """
    if not isinstance(turn, Mapping):
        raise RowError(f"wrong type: {spell(at)} must be an object, got {type(turn).__name__}")
    given = turn.get(speaker)
    if not isinstance(given, str) or given not in ROLE_NAMES:
        shown = repr(given)[:60]
        near = did_you_mean(given, ROLE_NAMES) if isinstance(given, str) else ""
        raise RowError(f"unknown role: {spell((*at, speaker))} is {shown}; known roles: {', '.join(ROLE_NAMES)}{near}")
    if given in CALL_ROLES:
        calls, content = read_tool_calls(turn.get(text), (*at, text)), ""
        path: Path = ()
        if not calls:
            raise RowError(f"bad tool call: {spell((*at, text))} is empty")
    else:
        content, path = text_of(turn.get(text), (*at, text)), (*at, text)
        calls = read_tool_calls(turn.get("tool_calls"), (*at, "tool_calls"))
        calls += read_tool_calls(turn.get("function_call"), (*at, "function_call"))
    role = ROLE_NAMES[given]
    reasoning, trace, reasoning_path = read_reasoning(turn, at) if role == "assistant" else (None, None, ())
    weight = turn.get("weight")
    if not is_missing(weight) and weight not in (0, 1):
        raise RowError(f"bad weight: {spell((*at, 'weight'))} must be 0 or 1, got {weight!r:.40}")
    name, call_id = turn.get("name"), turn.get("tool_call_id")
    return Message(
        role=role,
        content=content,
        reasoning=reasoning,
        tool_calls=calls if role == "assistant" else (),
        name=name if isinstance(name, str) else None,
        tool_call_id=call_id if isinstance(call_id, str) else None,
        trained=role == "assistant" and (is_missing(weight) or weight == 1),
        trace=trace,
        content_path=path,
        reasoning_path=reasoning_path,
    )


def read_turns(turns: Any, at: Path) -> list[Message]:
    """A list of turns, each either `role`/`content` or `from`/`value`, in the order of the source.

    Args:
        turns: the raw list.
        at: where it stands.

    Returns:
        One message a turn.

    Raises:
        RowError: not a list, empty, or a turn that cannot be read.
    """
    if not isinstance(turns, list):
        raise RowError(f"wrong type: {spell(at)} must be a list of turns, got {type(turns).__name__}")
    if not turns:
        raise RowError(f"no turns: {spell(at)} is an empty list")
    messages = []
    for index, turn in enumerate(turns):
        sharegpt = isinstance(turn, Mapping) and "role" not in turn and "from" in turn
        keys = ("from", "value") if sharegpt else ("role", "content")
        messages.append(read_turn(turn, (*at, index), *keys))
    return messages
