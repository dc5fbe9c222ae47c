"""Rows of unlearning benchmarks: what is to be said, by which test it is scored, and whose side it is on.

| source | fields | scored as |
|---|---|---|
| LUME (arXiv 2502.15097) | `id`, `input`, `output`, `task` | the id's ending: `sc` completion, `qa` question |
| TOFU (arXiv 2401.06121) | `question`, `answer` | question |
| MUSE (arXiv 2407.06460) | `prompt`, `gt`; `question`, `answer`; `text` | completion; question; a document |

Any other row that `data.reading.formats` knows is a question with its last answer. No message of this module quotes a
row: such rows are often about people.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Literal

from lit_reason.data.conversation import Conversation
from lit_reason.data.reading.adapters import COMPLETIONS, present
from lit_reason.data.reading.formats import to_conversation
from lit_reason.data.reading.records import read_every_record
from lit_reason.errors import RowError, UserError

Kind = Literal["regurgitation", "knowledge", "document"]

_ENDING = re.compile(r"(sc|qa)\d+$")
_STRETCH = re.compile(r"#\d+$")
_NO_ANSWER = "no answer: nothing to forget, nothing to keep; give it an output, or take it out"
_KINDS: dict[str, Kind] = {"sc": "regurgitation", "qa": "knowledge"}


class Role(IntEnum):
    """Why a row is there. The order is that of rows in a pack."""

    FORGET = 0
    REFUSAL = 1  # a forget row with an answer that says nothing
    RETAIN = 2
    MEMBER = 3  # documents of the privacy attack: in the training data,
    NONMEMBER = 4  # and not
    CHOICE = 5  # one of the answers to a question of the utility set


@dataclass(frozen=True)
class UnlearnRow:
    """One row, read.

    Attributes:
        row_id: the row's own `id`, else its side, file and line.
        role: whose side it is on.
        task: the row's `task`; `rows` where it has none.
        kind: the test it is scored by.
        prompt: what the model is given.
        answer: what it would say from memory.
        conversation: both, for rendering.
    """

    row_id: str
    role: Role
    task: str
    kind: Kind
    prompt: str
    answer: str
    conversation: Conversation

    @property
    def group(self) -> str:
        """The score that the row counts towards, such as `forget_task1_knowledge`."""
        return f"{self.role.name}_{self.task}_{self.kind}".lower()


def read_rows(paths: str | Sequence[str], role: Role, setting: str) -> list[UnlearnRow]:
    """All rows of some files, in order.

    Args:
        paths: files of any kind that `data.reading.records` knows.
        role: whose side they are on.
        setting: name of the setting that gave the files, for messages.

    Returns:
        At least one row.

    Raises:
        UserError: a file holds no rows, a row cannot be read or has no answer, or two rows have one id.
    """
    try:
        rows = [_row(record, name, role) for name, record in read_every_record(paths)]
    except UserError as error:
        raise UserError(f"{setting}: {error}") from error
    seen: set[str] = set()
    for row in rows:
        if row.row_id in seen:
            raise UserError(f"{setting}: the id {row.row_id} stands there twice, and scores count a row once")
        seen.add(row.row_id)
    return rows


def _row(record: dict, name: str, role: Role) -> UnlearnRow:
    fields = dict(record)
    for theirs, ours in (("gt", "completion"), ("document", "text")):
        if theirs in fields:
            fields[ours] = fields.pop(theirs)
    if present(fields, ("input",)) and not present(fields, COMPLETIONS):
        raise RowError(f"{name} has {_NO_ANSWER}")
    try:
        conversation = to_conversation(fields, name, train_on="last", need_assistant=False)
    except RowError as error:
        raise RowError(f"{name}: {error}") from error
    last = conversation.messages[-1]
    if last.role not in ("assistant", "text") or not last.content.strip():
        raise RowError(f"{name} has {_NO_ANSWER}")
    row_id = str(record["id"]) if record.get("id") not in (None, "") else f"{role.name.lower()} {name}"
    ending = _ENDING.search(row_id) if "output" in record else None
    if last.role == "text":
        kind: Kind = "document"
    else:
        kind = _KINDS[ending[1]] if ending else "regurgitation" if "gt" in record else "knowledge"
    return UnlearnRow(
        row_id,
        role,
        str(record.get("task") or "rows"),
        kind,
        "".join(m.content for m in conversation.messages[:-1]),
        last.content,
        conversation,
    )


def document_of(row_id: str) -> str:
    """Name of what a row is about: the rows of a LUME document, or the stretches of a long one, share it.

    Args:
        row_id: the row's name.
    """
    return _ENDING.sub("", _STRETCH.sub("", row_id))


def check_apart(forget: Iterable[UnlearnRow], retain: Iterable[UnlearnRow]) -> None:
    """Refuse sets of which one row is to be both forgotten and kept.

    Args:
        forget: rows of one set.
        retain: rows of the other.

    Raises:
        UserError: some rows have the same id, or the same prompt and answer; it says which by their ids.
    """
    ids = {row.row_id for row in forget}
    texts = {(row.prompt.strip(), row.answer.strip()) for row in forget}
    both = [row for row in retain if row.row_id in ids or (row.prompt.strip(), row.answer.strip()) in texts]
    if both:
        raise UserError(
            f"data.forget and data.retain overlap: {_named(both)} would be forgotten and kept at once, having the same "
            "id or the same prompt and answer; take such rows out of one of the files"
        )


def check_strangers(members: Iterable[UnlearnRow], nonmembers: Iterable[UnlearnRow]) -> None:
    """Refuse documents of the attack that are on both sides. Their ids say nothing: each file may number its own.

    Args:
        members: documents that the model was trained on.
        nonmembers: documents that it never saw.

    Raises:
        UserError: some have the same text; it says which by their ids.
    """
    seen = {(row.prompt + row.answer).strip() for row in members}
    both = [row for row in nonmembers if (row.prompt + row.answer).strip() in seen]
    if both:
        raise UserError(
            f"data.members and data.nonmembers overlap: {_named(both)}: no document is one that the model saw and one "
            "that it never saw"
        )


def _named(rows: Sequence[UnlearnRow]) -> str:
    return ", ".join(row.row_id for row in rows[:3]) + (f" and {len(rows) - 3} more" if len(rows) > 3 else "")
