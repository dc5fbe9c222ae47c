"""Problems to a JSONL file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lit_reason.data.reading.row_files import complete_or_absent


def write_problems(path: Path | str, record: Callable[[int], dict[str, Any]], count: int, *, desc: str = "") -> Path:
    """Write rows 0 to `count - 1`, one JSON object a line.

    Args:
        path: the file; an old one is replaced only when the new one is complete.
        record: gives the row of a number.
        count: number of rows.
        desc: label of the progress bar.

    Returns:
        The file.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with complete_or_absent(path) as unfinished, unfinished.open("w", encoding="utf-8") as file:
        for index in tqdm(range(count), desc=desc or path.name, unit=" rows", delay=1, leave=False):
            file.write(json.dumps(record(index)) + "\n")
    return path
