"""Writing rows to files so that a file is either complete or not there."""

from __future__ import annotations

import gzip
import json
import lzma
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lit_reason.errors import UserError, did_you_mean

Put = Callable[[dict[str, Any]], int]
"""Writes one row and returns its size in bytes before packing."""

SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet")
_PACKED = {".gz": gzip.open, ".xz": lzma.open}
_PARQUET_ROWS = 256  # rows held in memory until they are written as one group


@contextmanager
def complete_or_absent(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its name when the block ends without an error.

    Args:
        path: the file to make; an existing one is replaced at the end, not before.

    Yields:
        The temporary path. It is removed on any error.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)  # a full disk does not say where it is full
        raise
    finally:
        temporary.unlink(missing_ok=True)


def row_suffix(path: Path) -> str:
    """The kind of a row file by its name, a packing suffix (`.gz`, `.xz`) left aside.

    Args:
        path: the file to be written.

    Returns:
        One of `SUFFIXES`.

    Raises:
        UserError: another kind, or packed parquet.
    """
    plain = path.with_suffix("") if path.suffix in _PACKED else path
    if plain.suffix not in SUFFIXES or (plain != path and plain.suffix == ".parquet"):
        near = did_you_mean(plain.suffix, SUFFIXES)
        raise UserError(f"cannot write {path}: its name must end in {', '.join(SUFFIXES)}{near}")
    return plain.suffix


@contextmanager
def row_writer(path: Path, name: Path, like: str) -> Iterator[Put]:
    """Rows into a file, one at a time, in constant memory.

    Args:
        path: where to write.
        name: the file's final name, which says its kind.
        like: source of the rows; a parquet file takes its columns from there.

    Yields:
        A function that writes one row.

    Raises:
        UserError: parquet output from anything but one parquet file.
    """
    if row_suffix(name) == ".parquet":
        with _parquet_writer(path, like) as put:
            yield put
        return
    is_list = row_suffix(name) == ".json"
    opener: Any = _PACKED.get(name.suffix, open)
    with opener(path, "wt", encoding="utf-8") as file:
        start = "[\n" if is_list else ""

        def put(row: dict[str, Any]) -> int:
            nonlocal start
            line = json.dumps(row, ensure_ascii=False)
            file.write(start + line)
            start = ",\n" if is_list else "\n"
            return len(line)

        yield put
        file.write("\n]\n" if is_list else "\n")


@contextmanager
def _parquet_writer(path: Path, like: str) -> Iterator[Put]:
    if not like.endswith(".parquet") or not Path(like).is_file():
        raise UserError(f"parquet rows can only be written from one parquet file, not from {like}: write .jsonl")
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError("parquet needs the package pyarrow: pip install 'lit-reason[hub]'") from error
    try:
        schema = pyarrow.parquet.read_schema(like)
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"cannot read the parquet file {like}: {error}") from error
    with pyarrow.parquet.ParquetWriter(path, schema) as file:
        held: list[dict[str, Any]] = []

        def flush() -> None:
            file.write_table(pyarrow.Table.from_pylist(held, schema=schema))
            held.clear()

        def put(row: dict[str, Any]) -> int:
            held.append(row)
            if len(held) == _PARQUET_ROWS:
                flush()
            return sum(len(value) for value in row.values() if isinstance(value, str))

        yield put
        if held:
            flush()
