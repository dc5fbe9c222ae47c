"""Plain documents from files of any kind that `reading` knows."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

from lit_reason.data.reading.records import Quarantine, read_records
from lit_reason.errors import RowError, UserError, did_you_mean

MAX_DOCUMENT_BYTES = 100_000_000
TEXT_FILE = re.compile(r"\.txt(\.gz|\.xz)?$")
JOINED_CHARS = 100_000  # a plain text file is one document, cut at blank lines into parts of about this size


def read_documents(paths: Sequence[str], field: str, quarantine: Quarantine) -> Iterator[tuple[str, str]]:
    """Stream the documents of some files, in order.

    Args:
        paths: files, patterns, saved data sets or hub ids, as `data.reading.records` has them.
        field: where a row has its text: a field's name, or a path of names and list positions joined by dots.
        quarantine: takes the rows without text.

    Yields:
        Pairs of document name and text; the text of a blank document is empty.

    Raises:
        UserError: a file cannot be read, or the very first row has no such field.
    """
    first = True
    records = read_records(paths, quarantine, max_row_bytes=MAX_DOCUMENT_BYTES, stream_hub=True)
    for name, record in _joined(records):
        try:
            text = text_at(record, field)
        except RowError as error:
            if first:
                raise UserError(f"data.text_field is '{field}': {error} ({name})") from None
            quarantine.add(name, error, record)
            continue
        first = False
        yield name, text if text.strip() else ""


def text_at(record: dict[str, Any], field: str) -> str:
    """The text of a row.

    Args:
        record: the row.
        field: name, or path such as `messages.0.content`.

    Raises:
        RowError: there is no text at that place; names the nearest field.
    """
    value: Any = record
    for key in [field] if field in record else field.split("."):
        if isinstance(value, dict) and key in value:
            value = value[key]
        elif isinstance(value, list) and re.fullmatch(r"-?\d+", key) and -len(value) <= int(key) < len(value):
            value = value[int(key)]
        else:
            names = [str(name) for name in value] if isinstance(value, dict) else []
            found = f"the row has {', '.join(names[:8])}" if names else f"there is {type(value).__name__} at that place"
            raise RowError(f"no field '{key}': {found}{did_you_mean(key, names)}")
    if not isinstance(value, str):
        raise RowError(f"field '{field}' is no text: it is {type(value).__name__}")
    return value


def held_out(text: str, share: float, seed: int) -> bool:
    """Whether a document is kept for validation: a draw from its text, so that equal documents stay on one side.

    Args:
        text: the document.
        share: share of documents to hold out.
        seed: seed of the draw.
    """
    if share <= 0:
        return False
    drawn = hashlib.sha256(f"{seed}\0{text}".encode("utf-8", "replace")).digest()[:8]
    return int.from_bytes(drawn, "big") < share * 2**64


def _joined(records: Iterator[tuple[str, dict[str, Any]]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Put the paragraphs of each plain text file together again."""
    name, parts, size = "", [], 0  # type: str, list[str], int
    for row_id, record in records:
        source = row_id.rpartition(":")[0]
        in_text = bool(TEXT_FILE.search(source))
        if parts and (not in_text or source != name.rpartition(":")[0] or size > JOINED_CHARS):
            yield name, {"text": "\n\n".join(parts)}
            parts, size = [], 0
        if not in_text:
            yield row_id, record
            continue
        name = name if parts else row_id
        parts.append(record["text"])
        size += len(record["text"])
    if parts:
        yield name, {"text": "\n\n".join(parts)}
