"""Tokenised rows on disk: built once, read by memory map, safe when several processes want the same one.

A store is a folder named by a digest of everything its content depends on. It is written beside its final name
and renamed when whole, under a file lock, so that a reader never meets half a store.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from lit_reason.data.token_row import TokenRow

# Raise when rendering, condensing or the layout below changes what lies in a store.
STORE_VERSION = 1

COLUMNS: dict[str, type] = {"ids": np.int32, "weight": np.float32, "segment": np.uint8, "decile": np.int8}


def default_cache_folder() -> Path:
    """`$LIT_REASON_CACHE`, else `lit_reason` in the user's cache folder (`$XDG_CACHE_HOME` or `~/.cache`)."""
    if chosen := os.environ.get("LIT_REASON_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lit_reason"


def digest(parts: dict[str, Any]) -> str:
    """Hex digest of a JSON-able description."""
    text = json.dumps({"store_version": STORE_VERSION, **parts}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def file_digest(path: str | Path) -> str:
    """Hex digest of a file's bytes, or of the names, sizes and times of a folder's files; the name if neither exists.

    Hub ids fall under the last case: their content is pinned by the local hub cache.
    """
    path = Path(path)
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    if path.is_dir():
        listing = [(str(p.relative_to(path)), p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(path.rglob("*"))]
        return hashlib.sha256(json.dumps(listing).encode()).hexdigest()
    return str(path)


class TokenStore:
    """Rows of a finished store, read through memory maps.

    Args:
        folder: the store's folder.

    Attributes:
        lengths: `int64 [rows]` tokens of each row.
        weight_sums: `float64 [rows]` summed loss weight of each row.
        meta: what the builder had to say: counts, ledger, notes.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.meta: dict[str, Any] = json.loads((folder / "meta.json").read_text())
        self.row_ids: list[str] = json.loads((folder / "row_ids.json").read_text())
        self.offsets = np.fromfile(folder / "offsets.bin", dtype=np.int64)
        self.weight_sums = np.fromfile(folder / "weight_sums.bin", dtype=np.float64)
        self.lengths = np.diff(self.offsets)
        self._columns: dict[str, np.ndarray] | None = None

    def __len__(self) -> int:
        return len(self.row_ids)

    def __getstate__(self) -> dict:
        # A worker process opens its own maps instead of receiving a copy of the data.
        return {**self.__dict__, "_columns": None}

    @property
    def columns(self) -> dict[str, np.ndarray]:
        """The rows end to end, as memory maps."""
        if self._columns is None:
            self._columns = {n: np.memmap(self.folder / f"{n}.bin", dtype=t, mode="r") for n, t in COLUMNS.items()}
        return self._columns

    @property
    def trained_counts(self) -> np.ndarray:
        """`int64 [rows]` tokens of each row that carry loss; reads the weights of all rows."""
        trained = np.concatenate([[0], np.cumsum(self.columns["weight"] > 0, dtype=np.int64)])
        return np.diff(trained[self.offsets])

    def row(self, i: int) -> TokenRow:
        """Row `i` as copies (safe to keep)."""
        span = slice(self.offsets[i], self.offsets[i + 1])
        columns: dict[str, Any] = {n: np.array(c[span]) for n, c in self.columns.items()}
        return TokenRow(**columns, row_id=self.row_ids[i])


def write_store(folder: Path, rows: Iterator[TokenRow], finish: Callable[[], dict[str, Any]]) -> None:
    """Write rows into an empty folder, a row at a time.

    Args:
        folder: must exist and be empty.
        rows: consumed once, in constant memory but for the row names.
        finish: called after the last row; its result is the store's `meta`.
    """
    offsets, sums, row_ids = [0], [], []
    with ExitStack() as stack:
        files = {name: stack.enter_context((folder / f"{name}.bin").open("wb")) for name in COLUMNS}
        for row in rows:
            for name, dtype in COLUMNS.items():
                files[name].write(np.ascontiguousarray(getattr(row, name), dtype=dtype).tobytes())
            offsets.append(offsets[-1] + len(row))
            sums.append(float(row.weight.sum(dtype=np.float64)))
            row_ids.append(row.row_id)
    (folder / "offsets.bin").write_bytes(np.asarray(offsets, dtype=np.int64).tobytes())
    (folder / "weight_sums.bin").write_bytes(np.asarray(sums, dtype=np.float64).tobytes())
    (folder / "row_ids.json").write_text(json.dumps(row_ids))
    (folder / "meta.json").write_text(json.dumps(finish(), indent=1))


def open_folder(cache: Path, key: str, build: Callable[[Path], None]) -> Path:
    """The folder named `key`, built first if it is not there yet.

    Args:
        cache: folder of all such folders.
        key: digest of everything the content depends on.
        build: fills an empty folder. One process runs it, the others wait.
    """
    folder = cache / key
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / f"{key}.lock"):
        if not folder.exists():
            unfinished = cache / f"{key}.building"
            shutil.rmtree(unfinished, ignore_errors=True)  # left by a killed process: nobody else holds the lock
            unfinished.mkdir()
            try:
                build(unfinished)
                os.replace(unfinished, folder)
            except BaseException as error:
                shutil.rmtree(unfinished, ignore_errors=True)
                if isinstance(error, OSError) and error.errno is not None and error.filename is None:
                    error.filename = str(folder)  # a full disk does not say where it is full
                raise
    return folder


def open_store(
    cache: Path,
    key: str,
    build: Callable[[], tuple[Iterator[TokenRow], Callable[[], dict[str, Any]]]],
) -> TokenStore:
    """The store named `key`, built first if it is not there yet.

    Args:
        cache: folder of all stores.
        key: digest of everything the content depends on.
        build: returns the rows and the `finish` of `write_store`. One process runs it, the others wait.
    """
    return TokenStore(open_folder(cache, key, lambda folder: write_store(folder, *build())))
