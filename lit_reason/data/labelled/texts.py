"""Labelled texts from files, split so that nothing is judged by what it was made of."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lit_reason.data.reading.records import Quarantine, read_records
from lit_reason.data.text.documents import text_at
from lit_reason.errors import RowError, UserError

Part = Literal["train", "val", "judge"]


@dataclass(frozen=True)
class LabelledText:
    """One text.

    Attributes:
        number: unique in its history, and the same in every run over the same files.
        row_id: name of the row.
        text: what was written.
        label: name of its class.
        pair: name of the pair it belongs to; None where there is none.
    """

    number: int
    row_id: str
    text: str
    label: str
    pair: str | None = None


def read_history(
    paths: Sequence[str], text_field: str, label_field: str, pair_field: str | None, quarantine: Quarantine
) -> list[LabelledText]:
    """All texts of some files.

    Args:
        paths: files, patterns, saved data sets or hub ids, as `data.reading.records` has them.
        text_field: where a row has its text.
        label_field: where it has its label: a word or a number.
        pair_field: where it has the name of its pair; None reads none.
        quarantine: takes rows without text or label.

    Raises:
        UserError: a file cannot be read, or the texts have one label only, or none.
    """
    found: list[LabelledText] = []
    for row_id, record in read_records(list(paths), quarantine):
        try:
            text = text_at(record, text_field)
            if not text.strip():
                raise RowError(f"field '{text_field}' is empty")
            label = _name_at(record, label_field)
            pair = None if pair_field is None else _name_at(record, pair_field)
        except RowError as error:
            quarantine.add(row_id, str(error), record)
            continue
        found.append(LabelledText(len(found), row_id, text, label, pair))
    counts = Counter(item.label for item in found)
    if len(counts) < 2:
        had = f"all {len(found)} have the label '{next(iter(counts))}'" if counts else "none could be used"
        raise UserError(
            f"data.history: {', '.join(paths)} must hold texts of two labels at least (data.label_field is "
            f"'{label_field}'): {had}. {quarantine.summary()}"
        )
    return found


def _name_at(record: dict[str, Any], field: str) -> str:
    """A word or a whole number of a row, as text."""
    node: Any = record
    for key in [] if field in record else field.split(".")[:-1]:
        node = node.get(key) if isinstance(node, dict) else None
    last = field if field in record else field.rpartition(".")[2]
    value = node.get(last) if isinstance(node, dict) else None
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, str) and value.strip():
        return value.strip()
    text_at(record, field)  # names the nearest field where there is none of that name
    raise RowError(f"field '{field}' is no label: it is {value!r}")


def part_of(text: str, holdout: float, judge_share: float, seed: int) -> Part:
    """Which part a text belongs to: a draw from the text itself, so that equal texts stay together.

    Args:
        text: the text.
        holdout: share of texts to validate on.
        judge_share: share of texts that the judge learns from.
        seed: of the draw.
    """
    drawn = int.from_bytes(hashlib.sha256(f"{seed}\0{text}".encode("utf-8", "replace")).digest()[:8], "big") / 2**64
    return "val" if drawn < holdout else "judge" if drawn < holdout + judge_share else "train"


def split_history(
    history: Sequence[LabelledText], holdout: float, judge_share: float, seed: int
) -> dict[Part, list[LabelledText]]:
    """The history in its parts.

    Args:
        history: all texts.
        holdout: share of texts to validate on.
        judge_share: share of texts that the judge learns from.
        seed: of the draw.

    Raises:
        UserError: a part that is asked for lacks a class.
    """
    parts: dict[Part, list[LabelledText]] = {"train": [], "val": [], "judge": []}
    for item in history:
        parts[part_of(item.text, holdout, judge_share, seed)].append(item)
    labels = {item.label for item in history}
    for part, setting, share in (
        ("train", "holdout", 1.0),
        ("val", "holdout", holdout),
        ("judge", "judge_share", judge_share),
    ):
        missing = sorted(labels - {item.label for item in parts[part]}) if share > 0 else []  # type: ignore[index]
        if missing:
            count = sum(item.label == missing[0] for item in history)
            raise UserError(
                f"data.{setting}: no text of class '{missing[0]}' is left for the part '{part}'; the class has {count} "
                "texts. Add texts, or change data.holdout, data.judge_share or data.seed"
            )
    return parts
