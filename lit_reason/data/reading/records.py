"""Records from files and data sets, one at a time, and the quarantine for those that cannot be used.

Everything streams, JSON lists too (data/reading/pieces.py): no more than a row or two of a file are in memory.

| source | records |
|---|---|
| `.jsonl`, `.ndjson`, `.json` | one object a line, or one list of objects (its first character tells) |
| `.txt` | one `{"text": ...}` for each run of lines between blank lines |
| `.parquet` | one a row (extra `hub`) |
| folder written by `datasets.save_to_disk` | `folder` or `folder:split` (extra `hub`) |
| hub data set | `user/name`, `user/name:split`, `user/name/config:split` (extra `hub`) |

Files may be packed with gzip or xz. A path may hold `*`, `?` or `[...]`, and several paths may be given.
"""

from __future__ import annotations

import glob
import gzip
import io
import json
import lzma
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from lit_reason.data.reading.pieces import DamagedFile, Piece, lines, list_items, paragraphs
from lit_reason.data.reading.tables import hub_id, parquet_rows, saved_rows
from lit_reason.errors import RowError, UserError, did_you_mean

Record = dict[str, Any]

MAX_ROW_BYTES = 10_000_000
RAW_CHARS = 2000
FIRST_REASONS = 3
_PACKINGS = (".gz", ".xz")
_TEXT_SUFFIXES = (".txt",)
_JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
_UTF8_BOM = b"\xef\xbb\xbf"
_UTF16_BOMS = (b"\xff\xfe", b"\xfe\xff")
_DAMAGED = (DamagedFile, OSError, EOFError, zlib.error, lzma.LZMAError)


class Quarantine:
    """Where rows go that cannot be used: counted by reason, and written with it to a JSON Lines file.

    Each line of the file is `{"row": name, "reason": text, "raw": first 2000 characters}`. The file appears
    with the first bad row (replacing one from an earlier run) and is complete up to the last row.

    Args:
        path: the file; None keeps counts only.
        max_bad_rows: how many bad rows are tolerated; one more stops the run.

    Attributes:
        counts: number of rows by short reason, the part of the reason before its first colon.
        total: number of rows.
    """

    def __init__(self, path: str | Path | None, max_bad_rows: int):
        self.path = Path(path) if path is not None else None
        self.max_bad_rows = max_bad_rows
        self.counts: Counter[str] = Counter()
        self.total = 0
        self._first: list[str] = []
        self._file: IO[str] | None = None

    def add(self, row_id: str, reason: str | RowError, raw: Any) -> None:
        """Takes in one bad row.

        Args:
            row_id: the row's name.
            reason: what is wrong with it; `short: detail` reads best.
            raw: the row as text, bytes or record; only its beginning is kept.

        Raises:
            UserError: more than `max_bad_rows` rows are bad, or the file cannot be written.
        """
        reason = str(reason)
        self.total += 1
        self.counts[reason.split(":", 1)[0][:80]] += 1
        if len(self._first) < FIRST_REASONS:
            self._first.append(f"{row_id}: {reason}")
        self._write({"row": row_id, "reason": reason, "raw": _shortened(raw)})
        if self.total > self.max_bad_rows:
            self.close()
            raise UserError(f"more than {self.max_bad_rows} bad rows (max_bad_rows)\n{self.summary()}")

    def summary(self) -> str:
        """Counts by reason, the first rows in full, and where the others can be read."""
        counts = ", ".join(f"{n} x {reason}" for reason, n in self.counts.most_common())
        lines = [f"bad rows: {self.total} ({counts})" if self.total else "bad rows: 0"]
        lines += [f"  {first}" for first in self._first]
        if self.path is not None and self.total:
            lines.append(f"  all of them: {self.path}")
        return "\n".join(lines)

    def close(self) -> None:
        """Closes the file; a later `add` goes on in it."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write(self, line: dict[str, str]) -> None:
        if self.path is None:
            return
        try:
            if self._file is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._file = self.path.open("w" if self.total == 1 else "a", encoding="utf-8")
            self._file.write(json.dumps(line) + "\n")  # ASCII: raw text may hold what UTF-8 cannot
            self._file.flush()
        except OSError as error:
            raise UserError(f"cannot write the quarantine file {self.path}: {error}") from error

    def __enter__(self) -> Quarantine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _shortened(raw: Any) -> str:
    if isinstance(raw, bytes):
        return raw[: 4 * RAW_CHARS].decode("utf-8", errors="backslashreplace")[:RAW_CHARS]
    if not isinstance(raw, str):
        raw = json.dumps(raw, ensure_ascii=False, default=str)
    return raw[:RAW_CHARS]


def read_records(
    path: str | Path | Sequence[str | Path],
    quarantine: Quarantine,
    *,
    max_row_bytes: int = MAX_ROW_BYTES,
    stream_hub: bool = False,
) -> Iterator[tuple[str, Record]]:
    """Streams the records of one or several sources, in order.

    Args:
        path: a file, a pattern, a saved data set, a hub id, a comma-separated list of these, or a sequence.
        quarantine: takes the rows that are no objects, not JSON, not UTF-8 or too large.
        max_row_bytes: a larger row is bad; it is skipped without being held in memory.
        stream_hub: fetch the rows of hub data sets as they are read, and not the whole split first.

    Returns:
        Pairs of row name and record. The name is `<file name>:<line or index from 1>`; where two sources
        have the same file name it starts with the whole path.

    Raises:
        UserError: a source that is missing, unreadable, empty, damaged or of an unknown kind; a missing one
            at once, the others when the stream gets there.
    """
    given = [path] if isinstance(path, str | Path) else list(path)
    sources = [source for item in given for source in _expand(str(item))]
    if not sources:
        raise UserError("no data: the list of files is empty")
    names = [Path(source).name for source in sources]
    labels = [source if names.count(name) > 1 else name for source, name in zip(sources, names, strict=True)]
    readers = [_reader(source, label, max_row_bytes, stream_hub) for source, label in zip(sources, labels, strict=True)]

    def stream() -> Iterator[tuple[str, Record]]:
        for source, rows in zip(sources, readers, strict=True):
            good, bad = 0, quarantine.total
            for row_id, record in rows(quarantine):
                good += 1
                yield row_id, record
            if not good and quarantine.total > bad:
                raise UserError(f"{source}: not one usable row\n{quarantine.summary()}")
            if not good:
                raise UserError(f"{source}: holds no rows")

    return stream()


def read_every_record(path: str | Path | Sequence[str | Path]) -> Iterator[tuple[str, Record]]:
    """The same for data of which every row counts: the first bad row ends the reading.

    Args:
        path: as in `read_records`.

    Raises:
        UserError: as there, and for a bad row, which is named with what is wrong with it.
    """
    return read_records(path, _NoBadRows(None, 0))


class _NoBadRows(Quarantine):
    def add(self, row_id: str, reason: str | RowError, raw: Any) -> None:
        raise UserError(f"{row_id}: {reason}")


def _expand(given: str) -> list[str]:
    """The sources that a path, a pattern or a comma-separated list of them stands for."""
    if os.path.exists(given):
        return [given]
    if "," in given:
        return [source for part in given.split(",") if part.strip() for source in _expand(part.strip())]
    if hub_id(given) is None and glob.has_magic(given):
        found = sorted(glob.glob(given, recursive=True))
        if not found:
            raise UserError(f"no file matches the pattern {given}")
        return found
    return [given]


_Rows = Callable[[Quarantine], Iterator[tuple[str, Record]]]


def _reader(source: str, label: str, limit: int, stream_hub: bool) -> _Rows:
    """The function that streams one source; raises at once where there is no such source."""
    folder, _, split = source.rpartition(":")
    if os.path.isdir(source):
        return _fixed(saved_rows(Path(source), None, label))
    if os.path.isdir(folder):
        return _fixed(saved_rows(Path(folder), split, label))
    hub = hub_id(source)
    # A typing error in a local path must not become a question to the hub.
    if hub is not None and not os.path.exists(source) and not os.path.isdir(os.path.dirname(source)):
        return _fixed(hub.rows(label, stream_hub))
    _check_file(Path(source))
    return lambda quarantine: _file_rows(Path(source), label, quarantine, limit)


def _fixed(rows: Iterator[tuple[str, Record]]) -> _Rows:
    return lambda quarantine: rows


def _check_file(path: Path) -> None:
    if os.path.exists(path):
        return
    if not os.path.isdir(path.parent):
        raise UserError(f"no such file: {path} (there is no folder {path.parent})")
    raise UserError(f"no such file: {path}{did_you_mean(path.name, sorted(os.listdir(path.parent)))}")


def _file_rows(path: Path, label: str, quarantine: Quarantine, limit: int) -> Iterator[tuple[str, Record]]:
    """The records of one file, by its content first and its suffix second."""
    suffix = next((s.lower() for s in reversed(path.suffixes) if s not in _PACKINGS), "")
    position = "at its beginning"
    try:
        with _opened(path) as (stream, head):
            kind = _kind(path, suffix, head)
            if kind == "parquet":
                yield from parquet_rows(path, label, quarantine, limit)
                return
            if head.startswith(_UTF8_BOM):
                stream.read(len(_UTF8_BOM))
            parse = _document if kind == "text" else _parsed
            for index, raw, size in _CUTTERS[kind](stream, limit):
                row_id = f"{label}:{index}"
                try:
                    record = parse(raw, size, limit)
                except RowError as error:
                    if suffix == ".json" and kind == "lines" and position == "at its beginning":
                        what = "neither a list of objects nor one object a line"
                        raise UserError(f"{path}: {what}: {error}") from None
                    quarantine.add(row_id, error, raw)
                else:
                    yield row_id, record
                position = f"after {row_id}"
    except _DAMAGED as error:
        reason = error.strerror if isinstance(error, PermissionError) else error
        raise UserError(f"cannot read {path} {position}: {reason}") from error


_CUTTERS: dict[str, Callable[[io.BufferedReader, int], Iterator[Piece]]] = {
    "list": list_items,
    "lines": lines,
    "text": paragraphs,
}


@contextmanager
def _opened(path: Path) -> Iterator[tuple[io.BufferedReader, bytes]]:
    """The file, unpacked, and its first bytes without consuming them."""
    with path.open("rb") as raw:
        magic = raw.peek(6)[:6]
        stream: io.BufferedReader = raw
        if magic.startswith(b"\x1f\x8b"):
            stream = io.BufferedReader(gzip.GzipFile(fileobj=raw))  # type: ignore[assignment]
        elif magic == b"\xfd7zXZ\x00":
            stream = io.BufferedReader(lzma.LZMAFile(raw))  # type: ignore[assignment, type-var]
        yield stream, stream.peek(64)[:64]


def _kind(path: Path, suffix: str, head: bytes) -> str:
    """What the file holds: `parquet`, `list`, `lines` or `text`."""
    if not head:
        raise UserError(f"{path}: the file is empty")
    if suffix == ".parquet" or head.startswith(b"PAR1"):
        return "parquet"
    if head.startswith(_UTF16_BOMS):
        raise UserError(f"{path}: the file is UTF-16 text; save it as UTF-8")
    if suffix in _TEXT_SUFFIXES:
        return "text"
    first = head.removeprefix(_UTF8_BOM).lstrip()[:1]
    if first == b"[":
        return "list"
    if first == b"{" or suffix in _JSON_SUFFIXES:
        return "lines"
    allowed = ", ".join((*_JSON_SUFFIXES, ".parquet", *_TEXT_SUFFIXES))
    raise UserError(f"{path}: unknown kind of file; allowed are {allowed}, packed as .gz or .xz or not")


def _document(raw: bytes, size: int, limit: int) -> Record:
    return {"text": _decoded(raw, size, limit)}


def _decoded(raw: bytes, size: int, limit: int) -> str:
    if size > limit:
        raise RowError(f"row too large: {size:,} bytes, the limit is {limit:,} (max_row_bytes)")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RowError(f"not UTF-8: byte 0x{raw[error.start]:02x} at column {error.start + 1}") from None


def _unique(pairs: list[tuple[str, Any]]) -> Record:
    record = dict(pairs)
    if len(record) != len(pairs):
        twice = next(key for key, n in Counter(key for key, _ in pairs).items() if n > 1)
        raise RowError(f"duplicate key: '{twice[:40]}' stands twice in one object")
    return record


# NaN and Infinity are let in, as Python writes them: in an unused field they do no harm, in a used one the
# format adapters treat NaN as missing.
_DECODER = json.JSONDecoder(object_pairs_hook=_unique)


def _parsed(raw: bytes, size: int, limit: int) -> Record:
    """One row from its bytes; raises RowError."""
    text = _decoded(raw, size, limit)
    try:
        value = _DECODER.decode(text)
        if b"\\ud" in raw or b"\\uD" in raw:
            _check_surrogates(value)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno} of the row, " if error.lineno > 1 else ""
        raise RowError(f"not JSON: {error.msg} at {line}column {error.colno}") from None
    except RecursionError:
        raise RowError("not JSON: nested too deeply") from None
    except ValueError as error:  # an integer with thousands of digits
        raise RowError(f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise RowError(f"not an object: a row must be a JSON object, got {type(value).__name__}")
    return value


def _check_surrogates(value: Any) -> None:
    """Refuses half a surrogate pair: no tokenizer and no UTF-8 file can hold it."""
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(error.object[error.start])
        raise RowError(f"broken character: \\u{code:04x} is half a surrogate pair") from None
