"""Records from parquet files and Hugging Face data sets. Both need the extra `hub`, imported where used."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from lit_reason.errors import RowError, UserError, did_you_mean

if TYPE_CHECKING:
    from lit_reason.data.reading.records import Quarantine

Record = dict[str, Any]

_BATCH_ROWS = 64
_HUB_ID = re.compile(r"([\w.-]+/[\w.-]+)(?:/([\w.-]+))?(?::([\w.%+\[\]:-]+))?")
_FILE_SUFFIX = re.compile(r"\.(jsonl|ndjson|json|txt|parquet|csv|tsv|arrow|gz|xz|zst|bz2|zip)$")


@dataclass(frozen=True)
class HubId:
    """A data set on the hub.

    Attributes:
        name: `user/name`.
        config: its configuration, where it has several.
        split: the split to read.
    """

    name: str
    config: str | None
    split: str

    def rows(self, label: str, streaming: bool = False) -> Iterator[tuple[str, Record]]:
        """Streams the split's rows.

        Args:
            label: what the row names start with.
            streaming: fetch rows as they are read; otherwise the split is downloaded whole, once, and memory-mapped.

        Returns:
            Pairs of row name and record.

        Raises:
            UserError: the extra is not installed, or the hub does not give the data set.
        """
        datasets = _datasets(f"the hub data set {self.name}")
        try:
            how = {"streaming": True} if streaming else {}
            table = datasets.load_dataset(self.name, self.config, split=self.split, **how)
        except (OSError, ValueError) as error:
            raise UserError(f"cannot load the hub data set {self.name} (split {self.split}): {error}") from error
        return _dataset_rows(table, label)


def hub_id(source: str) -> HubId | None:
    """The hub data set that a source of the form `user/name[/config][:split]` names.

    Args:
        source: what the user gave.

    Returns:
        The parsed id (split `train` where none is given); None for another form or a name with a file suffix.
    """
    match = _HUB_ID.fullmatch(source)
    if match is None or source.startswith((".", "~")) or _FILE_SUFFIX.search(source):
        return None
    return HubId(match[1], match[2], match[3] or "train")


def saved_rows(folder: Path, split: str | None, label: str) -> Iterator[tuple[str, Record]]:
    """Streams a data set that `datasets` saved with `save_to_disk`; it is memory-mapped, not loaded.

    Args:
        folder: the saved data set, or the saved dictionary of splits.
        split: which of the splits; None takes the only one, or `train`.
        label: what the row names start with.

    Returns:
        Pairs of row name and record.

    Raises:
        UserError: not such a folder, no such split, or the extra is not installed.
    """
    if not any((folder / name).is_file() for name in ("state.json", "dataset_dict.json")):
        near = sorted(p.name for p in folder.iterdir() if _FILE_SUFFIX.search(p.name))
        hint = f"; it holds {', '.join(near[:5])}: name the file, or {folder}/*" if near else ""
        raise UserError(f"{folder} is a folder, but not one written by datasets.save_to_disk{hint}")
    datasets = _datasets(f"the saved data set {folder}")
    try:
        table = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"cannot load the saved data set {folder}: {error}") from error
    if isinstance(table, datasets.DatasetDict):
        name = split or ("train" if len(table) != 1 else next(iter(table)))
        if name not in table:
            raise UserError(
                f"{folder} has no split '{name}': it has {', '.join(table)}; "
                f"write {folder}:SPLIT{did_you_mean(name, table)}"
            )
        table = table[name]
    elif split is not None:
        raise UserError(f"{folder} is a single data set without splits: leave ':{split}' away")
    return _dataset_rows(table, label)


def parquet_rows(path: Path, label: str, quarantine: Quarantine, limit: int) -> Iterator[tuple[str, Record]]:
    """Streams the rows of a parquet file, a batch of 64 in memory.

    Args:
        path: the file.
        label: what the row names start with.
        quarantine: takes rows over the limit.
        limit: largest row in bytes of its columns in memory.

    Yields:
        Pairs of row name and record.

    Raises:
        UserError: not a parquet file, or the extra is not installed.
    """
    try:
        import pyarrow as arrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise _missing(f"the parquet file {path}", "pyarrow") from error
    index = 0
    try:
        with parquet.ParquetFile(path) as table:
            for batch in table.iter_batches(batch_size=_BATCH_ROWS):
                sizes = [batch.slice(i, 1).nbytes for i in range(len(batch))] if batch.nbytes > limit else []
                for i, record in enumerate(batch.to_pylist()):
                    index += 1
                    if sizes and sizes[i] > limit:
                        reason = f"row too large: {sizes[i]:,} bytes, the limit is {limit:,} (max_row_bytes)"
                        quarantine.add(f"{label}:{index}", RowError(reason), "")
                        continue
                    yield f"{label}:{index}", record
    except (arrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the parquet file {path} after row {index}: {error}") from error


def _dataset_rows(table: Any, label: str) -> Iterator[tuple[str, Record]]:
    return ((f"{label}:{index}", dict(row)) for index, row in enumerate(table, 1))


def _datasets(what: str) -> ModuleType:
    try:
        import datasets
    except ImportError as error:
        raise _missing(what, "datasets") from error
    return datasets


def _missing(what: str, package: str) -> UserError:
    return UserError(f"{what} needs the package {package}: pip install 'lit-reason[hub]'")
