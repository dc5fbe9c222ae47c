"""Token rows of plain text on disk: two or four bytes a token, read by memory map."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from lit_reason.data.text.text_rows import TextRow
from lit_reason.data.token_row import DECILE_NONE, Segment, TokenRow


class TextStore:
    """Rows of a finished store. Weights and segments are not stored: all tokens of a row but its first are trained.

    Args:
        folder: the store's folder.

    Attributes:
        lengths: `int64 [rows]` tokens of each row.
        weight_sums: `float64 [rows]` trained tokens of each row.
        meta: what the builder had to say.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.meta: dict[str, Any] = json.loads((folder / "meta.json").read_text())
        self.lengths = np.fromfile(folder / "lengths.bin", dtype=np.int64)
        self.offsets = np.concatenate([[0], np.cumsum(self.lengths)])
        self.weight_sums = (self.lengths - 1).astype(np.float64)
        self._maps: dict[str, np.ndarray] | None = None

    def __len__(self) -> int:
        return len(self.lengths)

    def __getstate__(self) -> dict:
        # A worker process opens its own maps instead of receiving a copy of the data.
        return {**self.__dict__, "_maps": None}

    @property
    def trained_counts(self) -> np.ndarray:
        """`int64 [rows]` tokens of each row that carry loss."""
        return self.weight_sums.astype(np.int64)

    def row(self, i: int) -> TokenRow:
        """Row `i` as copies (safe to keep)."""
        if self._maps is None:
            kinds = {"ids": self.meta["dtype"], "text_bytes": np.int64, "names": np.uint8, "name_ends": np.int64}
            self._maps = {n: np.memmap(self.folder / f"{n}.bin", dtype=kind, mode="r") for n, kind in kinds.items()}
        maps = self._maps
        ids = np.array(maps["ids"][self.offsets[i] : self.offsets[i + 1]], dtype=np.int32)
        weight = np.ones(len(ids), dtype=np.float32)
        weight[0] = 0
        name = bytes(maps["names"][maps["name_ends"][i - 1] if i else 0 : maps["name_ends"][i]])
        return TokenRow(
            ids=ids,
            weight=weight,
            segment=np.full(len(ids), Segment.TEXT, dtype=np.uint8),
            decile=np.full(len(ids), DECILE_NONE, dtype=np.int8),
            row_id=name.decode(),
            text_bytes=int(maps["text_bytes"][i]),
        )


def write_text_store(
    folder: Path, rows: Iterator[TextRow], vocabulary: int, finish: Callable[[], dict[str, Any]]
) -> None:
    """Write rows into an empty folder, in constant memory.

    Args:
        folder: must exist and be empty.
        rows: consumed once.
        vocabulary: number of token ids; up to 65,536 of them take two bytes.
        finish: called after the last row; its result becomes part of the store's `meta`.
    """
    kind = np.uint16 if vocabulary <= 2**16 else np.int32
    named = 0
    with ExitStack() as stack:
        columns = ("ids", "lengths", "text_bytes", "names", "name_ends")
        files = {name: stack.enter_context((folder / f"{name}.bin").open("wb")) for name in columns}
        for row in rows:
            name = row.name.encode("utf-8", "replace")
            named += len(name)
            files["ids"].write(row.ids.astype(kind).tobytes())
            files["names"].write(name)
            for column, number in (("lengths", len(row.ids)), ("text_bytes", row.text_bytes), ("name_ends", named)):
                files[column].write(np.int64(number).tobytes())
    (folder / "meta.json").write_text(json.dumps({**finish(), "dtype": np.dtype(kind).name}, indent=1))
