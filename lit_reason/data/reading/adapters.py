"""How each known data set format is read: one function a format, and the table `FORMATS` over them.

Users of the table go through data/reading/formats.py, whose docstring lists the formats and their fields.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from lit_reason.data.conversation import Message, Path
from lit_reason.data.reading.turns import is_missing, read_reasoning, read_turn, read_turns, text_of
from lit_reason.errors import RowError, did_you_mean

Record = dict[str, Any]

TURN_LISTS = ("messages", "conversations", "conversation")
SYSTEM_KEYS = ("system", "system_prompt")
TOOL_KEYS = ("tools", "functions")
PROMPTS = ("prompt", "query", "input")
COMPLETIONS = ("completion", "response", "output", "answer")
QUESTIONS = ("question", "problem")
SOLUTIONS = ("solution", "generated_solution", "model_answer", "response", "answer")
REFERENCES = ("answer", "final_answer", "reference_answer", "expected_answer", "ground_truth")


@dataclass(frozen=True)
class Reading:
    """What an adapter took from a record.

    Attributes:
        messages: the turns, without the row's system prompt.
        used: names of the fields it consumed.
        answer: the reference answer, if any.
        lacking: why there is nothing to train on, should there be no assistant turn.
    """

    messages: list[Message]
    used: set[str]
    answer: str | None = None
    lacking: str = "the row has no assistant turn"


@dataclass(frozen=True)
class Adapter:
    """One format.

    Attributes:
        matches: whether a record has this format's keys.
        read: takes the conversation from the record; raises RowError.
    """

    matches: Callable[[Record], bool]
    read: Callable[[Record], Reading]


def present(record: Mapping[str, Any], keys: Iterable[str]) -> str | None:
    """The first of the keys that the record has with a value.

    Args:
        record: one row.
        keys: the fields to look for, in order.

    Returns:
        The key, or None.
    """
    return next((key for key in keys if not is_missing(record.get(key))), None)


def last_assistant(messages: Iterable[Message]) -> int | None:
    """Index of the last assistant turn, or None.

    Args:
        messages: the turns.

    Returns:
        Its index from 0.
    """
    return max((i for i, m in enumerate(messages) if m.role == "assistant"), default=None)


def _required(record: Record, keys: tuple[str, ...]) -> str:
    key = present(record, keys)
    if key is None:
        near = "".join(dict.fromkeys(did_you_mean(k, record) for k in keys))
        raise RowError(f"missing field: the row has no {' or '.join(map(repr, keys))}{near}")
    return key


def _reference(record: Record, taken: str | None = None) -> tuple[str | None, set[str]]:
    """The reference answer and the field it came from; `taken` is already the assistant's text."""
    for key in REFERENCES:
        value = record.get(key)
        number = isinstance(value, int | float) and not isinstance(value, bool) and not is_missing(value)
        if key != taken and (number or (isinstance(value, str) and value.strip())):
            return str(value).strip(), {key}
    return None, set()


def _own_reference(text: str) -> str | None:
    """The reference inside an assistant text that is called `answer`: after `####`, or all of one line."""
    line = text.rpartition("####")[2].strip()
    return line if line and "\n" not in line else None


def _said(role: Literal["user", "assistant"], record: Record, key: str) -> list[Message]:
    """A field that is a turn's text, or a list of turns."""
    value = record[key]
    if isinstance(value, list) and all(isinstance(v, dict) and {"role", "from"} & v.keys() for v in value):
        return read_turns(value, (key,))
    content = text_of(value, (key,), numbers=key == "answer")
    return [Message(role, content, trained=role == "assistant", content_path=(key,))]


def _with_row_reasoning(record: Record, messages: list[Message]) -> tuple[list[Message], set[str]]:
    """The messages with the row's reasoning field put on the last assistant turn."""
    reasoning, trace, path = read_reasoning(record, ())
    index = last_assistant(messages)
    if reasoning is None or index is None or messages[index].reasoning is not None:
        return messages, set()
    changed = replace(messages[index], reasoning=reasoning, trace=trace, reasoning_path=path)
    return [*messages[:index], changed, *messages[index + 1 :]], {str(path[0])}


def _reply(record: Record, asked: list[Message], used: set[str], replies: tuple[str, ...]) -> Reading:
    """The question that was read, and the first reply field the row has, if any."""
    # An empty solution beside a usable answer is a hole in the table, not an answer.
    filled = [key for key in replies if record.get(key) != ""]
    key = present(record, filled) or present(record, replies)
    said = _said("assistant", record, key) if key else []
    messages, reasoned = _with_row_reasoning(record, asked + said)
    answer, referred = _reference(record, key)
    if answer is None and key == "answer":
        answer = _own_reference(said[-1].content)
    return Reading(messages, used | reasoned | referred | ({key} if key else set()), answer)


def _read_turn_list(record: Record) -> Reading:
    key = _required(record, TURN_LISTS)
    answer, referred = _reference(record)
    return Reading(read_turns(record[key], (key,)), {key} | referred, answer)


def _read_sharegpt(record: Record) -> Reading:
    if not _is_sharegpt(record):
        raise RowError("missing field: 'conversations' has no turns with 'from' and 'value'")
    return _read_turn_list(record)


def _is_sharegpt(record: Record) -> bool:
    key = present(record, TURN_LISTS)
    turns = record[key] if key else None
    first = turns[0] if isinstance(turns, list) and turns else None
    return isinstance(first, dict) and "from" in first and "role" not in first


def _read_prompt_completion(record: Record) -> Reading:
    key = _required(record, PROMPTS)
    return _reply(record, _said("user", record, key), {key}, COMPLETIONS)


def _is_prompt_completion(record: Record) -> bool:
    other = present(record, PROMPTS[1:]) and present(record, COMPLETIONS[:-1])
    return present(record, PROMPTS[:1]) is not None or other is not None


def _read_question_answer(record: Record) -> Reading:
    key = _required(record, QUESTIONS)
    return _reply(record, _said("user", record, key), {key}, SOLUTIONS)


def _instruction(record: Record) -> tuple[list[Message], set[str]]:
    """The user's turn of an alpaca row, the earlier turns of `history` before it."""
    messages = []
    history = record.get("history")
    if not is_missing(history):
        if not isinstance(history, list):
            raise RowError(f"wrong type: history must be a list of pairs, got {type(history).__name__}")
        for index, pair in enumerate(history):
            if not isinstance(pair, list | tuple) or len(pair) != 2:
                raise RowError(f"wrong type: history[{index}] must be a pair of user and assistant text")
            at: Path = ("history", index)
            messages.append(Message("user", text_of(pair[0], (*at, 0)), content_path=(*at, 0)))
            messages.append(Message("assistant", text_of(pair[1], (*at, 1)), trained=True, content_path=(*at, 1)))
    key = _required(record, ("instruction",))
    more = present(record, ("input", "context"))
    texts = [text_of(record[k], (k,)) for k in (key, more) if k]
    asked = "\n".join(t for t in texts if t)
    # Text from two fields has no single place to be written back to.
    path: Path = (key,) if asked == texts[0] else ()
    messages.append(Message("user", asked, content_path=path))
    return messages, {key, "history"} | ({more} if more else set())


def _read_alpaca(record: Record) -> Reading:
    asked, used = _instruction(record)
    return _reply(record, asked, used, ("output", "response"))


def _read_openr1(record: Record) -> Reading:
    key = _required(record, QUESTIONS + PROMPTS[:1])
    generations = record.get("generations")
    if not isinstance(generations, list) or not generations:
        raise RowError("missing field: 'generations' must be a list that is not empty")
    asked, used = _said("user", record, key), {key, "generations"}
    answer, referred = _reference(record)
    chosen = _best_generation(record, len(generations))
    if chosen is None:
        return Reading(asked, used | referred, answer, "no generation is marked complete and correct")
    path: Path = ("generations", chosen)
    said = Message("assistant", text_of(generations[chosen], path), trained=True, content_path=path)
    return Reading([*asked, said], used | referred, answer)


def _best_generation(record: Record, count: int) -> int | None:
    """Index of the first generation marked complete and correct; the first of all in a row without marks."""

    def marks(keys: tuple[str, ...]) -> list[bool]:
        lists = [v for v in map(record.get, keys) if isinstance(v, list) and len(v) == count]
        return [not lists or any(v[i] is True for v in lists) for i in range(count)]

    complete = marks(("is_reasoning_complete",))
    correct = marks(("correctness_math_verify", "correctness_llama"))
    return next((i for i in range(count) if complete[i] and correct[i]), None)


def _read_preference(record: Record) -> Reading:
    chosen = record.get("chosen")
    if is_missing(chosen):
        raise RowError("missing field: the row has no 'chosen'")
    answer, referred = _reference(record)
    used = {"chosen"} | referred
    if isinstance(chosen, str):
        said = [Message("assistant", chosen, trained=True, content_path=("chosen",))]
    elif isinstance(chosen, dict):
        keys = ("from", "value") if "from" in chosen and "role" not in chosen else ("role", "content")
        said = [read_turn(chosen, ("chosen",), *keys)]
    else:
        said = read_turns(chosen, ("chosen",))
        if said[0].role != "assistant":  # the pair holds whole conversations
            return Reading(said, used, answer)
    turns = present(record, TURN_LISTS)
    if turns is not None:
        asked, taken = read_turns(record[turns], (turns,)), {turns}
    elif present(record, ("instruction",)):
        asked, taken = _instruction(record)
    else:
        key = _required(record, PROMPTS + QUESTIONS)
        asked, taken = _said("user", record, key), {key}
    # Only the chosen turn was judged; the turns before it are context.
    asked = [replace(message, trained=False) for message in asked]
    return Reading(asked + said, used | taken, answer)


def _read_text(record: Record) -> Reading:
    key = _required(record, ("text",))
    content = record[key]
    if not isinstance(content, str):
        raise RowError(f"wrong type: text must be text, got {type(content).__name__}")
    return Reading([Message("text", content, trained=True, content_path=(key,))], {key})


# In the order in which `auto` tries them.
FORMATS: dict[str, Adapter] = {
    "preference": Adapter(lambda r: all(present(r, (k,)) for k in ("chosen", "rejected")), _read_preference),
    "sharegpt": Adapter(_is_sharegpt, _read_sharegpt),
    "messages": Adapter(lambda r: present(r, TURN_LISTS) is not None, _read_turn_list),
    "alpaca": Adapter(lambda r: present(r, ("instruction",)) is not None, _read_alpaca),
    "openr1": Adapter(
        lambda r: bool(isinstance(r.get("generations"), list) and present(r, QUESTIONS + PROMPTS[:1])),
        _read_openr1,
    ),
    "prompt_completion": Adapter(_is_prompt_completion, _read_prompt_completion),
    "question_answer": Adapter(lambda r: present(r, QUESTIONS) is not None, _read_question_answer),
    "text": Adapter(lambda r: present(r, ("text",)) is not None, _read_text),
}
