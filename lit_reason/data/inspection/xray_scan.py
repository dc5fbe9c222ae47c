"""The X-ray of a whole file: rows one at a time, as a run would make them, and a tally of constant size."""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np

from lit_reason.data.condensation.condense import Condenser
from lit_reason.data.conversation import Conversation
from lit_reason.data.datamodule import Split, TraceData
from lit_reason.data.inspection.xray import KINDS, Finding, examine
from lit_reason.data.reading.formats import to_conversation
from lit_reason.data.reading.records import Quarantine, Record, read_records
from lit_reason.data.rendering.contract import check_contract
from lit_reason.data.token_row import SEGMENT_NAMES, TokenRow
from lit_reason.errors import EmptyMask, RowError, UserError

EXAMPLES = 5  # findings of each kind that are kept in words


@dataclass
class Tally:
    """Sums over the rows seen so far.

    Attributes:
        rows: token rows.
        records: records of the file, unusable ones left out.
        lengths: number of rows by length in tokens, before rows are fitted to `max_length`.
        tokens: tokens by `Segment`, of the rows that would be trained on.
        trained: those of them that have a loss.
        over: rows longer than `max_length`.
        dropped: records that a rule of condensation or `max_length` leaves out, by reason.
        findings: rows by kind of finding.
        examples: the first findings of each kind.
        failed: records with a finding.
    """

    rows: int = 0
    records: int = 0
    lengths: Counter[int] = field(default_factory=Counter)
    tokens: np.ndarray = field(default_factory=lambda: np.zeros(len(SEGMENT_NAMES), dtype=np.int64))
    trained: np.ndarray = field(default_factory=lambda: np.zeros(len(SEGMENT_NAMES), dtype=np.int64))
    over: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    findings: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[Finding]] = field(default_factory=dict)
    failed: int = 0

    def add_rows(self, rows: list[TokenRow]) -> None:
        """Count rows that would be trained on.

        Args:
            rows: of one conversation.
        """
        self.rows += len(rows)
        for row in rows:
            self.tokens += np.bincount(row.segment, minlength=len(SEGMENT_NAMES))
            self.trained += np.bincount(row.segment[row.weight > 0], minlength=len(SEGMENT_NAMES))

    def add_findings(self, findings: list[Finding]) -> None:
        """Count what is wrong with one record; each kind once.

        Args:
            findings: of the record.
        """
        self.failed += bool(findings)
        for kind in {finding.kind: None for finding in findings}:
            self.findings[kind] += 1
        for finding in findings:
            known = self.examples.setdefault(finding.kind, [])
            if len(known) < EXAMPLES and finding.row_id not in [e.row_id for e in known]:
                known.append(finding)

    @property
    def trained_share(self) -> float:
        """Share of tokens that have a loss."""
        return float(self.trained.sum() / max(self.tokens.sum(), 1))

    def length_at(self, share: float) -> int:
        """The smallest length that at least this share of the rows does not exceed; 0 without rows.

        Args:
            share: between 0 and 1; 0.5 gives the median, 1 the longest row.
        """
        left = math.ceil(share * self.lengths.total())
        for length, count in sorted(self.lengths.items()):
            left -= count
            if left <= 0:
                return length
        return 0

    def in_order(self) -> list[Finding]:
        """The kept examples, by kind in the order of `KINDS`."""
        return [finding for kind in KINDS for finding in self.examples.get(kind, [])]


@dataclass(frozen=True)
class Picture:
    """One record under the X-ray.

    Attributes:
        row_id: its name.
        record: the row as read.
        conversation: after condensation; None where there is none to show.
        rows: token rows, longer ones than `max_length` included.
        findings: what is wrong.
        reason: why the row is not trained on, or empty.
    """

    row_id: str
    record: Record
    conversation: Conversation | None = None
    rows: list[TokenRow] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    reason: str = ""


class Scan:
    """Goes through the file of a split once. Iterate, then read the attributes.

    Args:
        data: data module whose tokenizer is set.
        split: `train`, `val` or `test`.

    Attributes:
        tally: sums over the rows.
        unusable: rows that cannot be read or rendered for a reason of their own.
        notes: what the chat template does.
        condenser: its ledger tells what condensation did.

    Raises:
        UserError: no file for this split, or settings that no run would start with.
    """

    def __init__(self, data: TraceData, split: Split = "train") -> None:
        data.setup("predict")  # builds the renderer
        self.data, self.paths = data, data.paths(split) if split != "val" or data.has_val else []
        if not self.paths:
            raise UserError(f"data.{split}_file is missing: give the file to look at, --data.{split}_file FILE")
        encode = data.tokenizer.encode
        condense = data.condense if split == "train" else data.condense_val
        self.condenser = Condenser(condense, lambda text: len(encode(text, add_special_tokens=False)))
        self.tally, self.unusable = Tally(), Quarantine(None, sys.maxsize)
        self.notes: list[str] = []
        try:
            self.notes = check_contract(data.renderer, []).notes
        except UserError as error:
            self.tally.add_findings([Finding("contract", "probe", str(error))])

    def __iter__(self) -> Iterator[Picture]:
        for path in self.paths:
            for row_id, record in read_records(path, self.unusable):
                picture = self._picture(row_id, record)
                self.tally.add_findings(picture.findings)
                yield picture

    def _picture(self, row_id: str, record: Record) -> Picture:
        data = self.data
        try:
            conversation = to_conversation(record, row_id, format=data.format, train_on=data.render.train_on)
            condensed = self.condenser(conversation)
            if condensed is None:
                self.tally.records += 1
                self.tally.dropped["by a rule of condensation"] += 1
                return Picture(row_id, record, reason="dropped by a rule of condensation")
            rows, findings = examine(data.renderer, condensed)
        except EmptyMask as error:
            self.tally.records += 1
            return Picture(row_id, record, findings=[Finding("empty_mask", row_id, str(error))])
        except RowError as error:
            self.unusable.add(row_id, error, record)
            return Picture(row_id, record, reason=f"unusable: {error}")
        self.tally.records += 1
        self.tally.lengths.update(len(row) for row in rows)
        long = sum(len(row) > data.max_length for row in rows)
        self.tally.over += long
        if not long:
            self.tally.add_rows(rows)
            return Picture(row_id, record, condensed, rows, findings)
        return self._long(Picture(row_id, record, condensed, rows, findings))

    def _long(self, picture: Picture) -> Picture:
        """A record with rows over `max_length`, as the recipe wants it."""
        limit = self.data.max_length
        assert picture.conversation is not None
        if self.data.over_length == "fit":
            fitted = self.condenser.fit(picture.conversation, limit, self._length)
            if fitted is not None:
                rows, findings = examine(self.data.renderer, fitted)
                self.tally.add_rows(rows)
                return replace(picture, conversation=fitted, rows=rows, findings=findings)
            reason = f"too long even when condensed, max_length is {limit}"
        else:
            reason = f"longer than {limit} tokens (max_length)"
            self.tally.add_rows([row for row in picture.rows if len(row) <= limit])
        self.tally.dropped[reason] += 1
        findings = picture.findings
        if self.data.over_length == "raise":
            longest = max(len(row) for row in picture.rows)
            findings = [*findings, Finding("too_long", picture.row_id, f"{longest} tokens, max_length is {limit}")]
        return replace(picture, findings=findings, reason=reason)

    def _length(self, conversation: Conversation) -> int:
        return max(len(row) for row in self.data.renderer.rows(conversation))
