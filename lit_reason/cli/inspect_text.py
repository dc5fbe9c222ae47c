"""The X-ray in a terminal: rows span by span, in colour where colour is wanted, and the summary of a file."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, TextIO

from lit_reason.data.token_row import SEGMENT_NAMES, Segment

if TYPE_CHECKING:
    from lit_reason.data.inspection.xray import Span
    from lit_reason.data.inspection.xray_scan import Picture, Scan, Tally
    from lit_reason.data.rendering.render import Renderer

# Select Graphic Rendition codes; colours only repeat what the words say.
COLOURS = {
    Segment.PROMPT: "2",
    Segment.MARKER: "35",
    Segment.UNDERSTANDING: "36",
    Segment.EXPLORATION: "33",
    Segment.CONVERGENCE: "32",
    Segment.SEAM: "91",
    Segment.SOLUTION: "94",
    Segment.END: "1;35",
    Segment.TOOL_CALL: "95",
    Segment.TEXT: "0",
}
GUTTER = 34  # columns left of the text
LONGEST = 700  # characters of a span that are shown


class Screen:
    """Prints to standard output.

    Args:
        renderer: its tokenizer turns ids into text.
        full: show long spans whole.
        out: where to print; default: standard output as it is now.
    """

    def __init__(self, renderer: Renderer, *, full: bool = False, out: TextIO | None = None) -> None:
        self.renderer, self.full, self.out = renderer, full, out or sys.stdout
        self.colour = wants_colour(self.out)
        self.width = max(shutil.get_terminal_size((110, 24)).columns, GUTTER + 30)
        encoding = self.out.encoding or "utf-8"
        self.encoding = encoding
        self.headed = False
        plain = "↵│✗✓–".encode(encoding, "replace").decode(encoding) != "↵│✗✓–"
        self.mark_line, self.mark_edge, self.mark_bad, self.mark_good, self.dash = (
            ("\\n", "|", "!", "*", "-") if plain else ("↵", "│", "✗", "✓", "–")
        )

    # ---- rows

    def row(self, picture: Picture) -> None:
        """Print one record.

        Args:
            picture: as the scan gives it.
        """
        from lit_reason.data.inspection.xray import decoded, kept_thoughts, spans

        lines = []
        if picture.rows and not self.headed:
            self.headed = True
            lines.append(
                self._paint("2", f"{'  segment':<16}tokens  loss{'':>6}text  (off: no loss; d0 to d9: decile)")
            )
        for row in picture.rows:
            trained = int((row.weight > 0).sum())
            facts = [row.row_id, f"{len(row):,} tokens", f"{trained:,} trained ({trained / len(row):.0%})"]
            lines.append(self._paint("1", ", ".join(facts)))
            for span in spans(row, lambda ids: decoded(self.renderer, ids)):
                lines += self._span(span)
        if not picture.rows:
            lines.append(self._paint("1", f"{picture.row_id}: not rendered"))
            lines += self._unrendered(picture)
        for message in picture.conversation.messages if picture.conversation else ():
            if message.trace is not None and message.trained:
                lines.append(f"  thoughts {kept_thoughts(message.trace).replace('-', self.dash)}")
        if picture.reason:
            lines.append(self._paint("33", f"  not trained on: {picture.reason}"))
        lines += [self._bad(f"  {self.mark_bad} {str(finding)}") for finding in picture.findings]
        self._print("\n".join([*lines, ""]))

    def _span(self, span: Span) -> Iterator[str]:
        loss = f"x{span.weight:g}" if span.trained else "off"
        decile = f"d{span.decile}" if span.decile >= 0 else ""
        head = f"  {span.name:<14}{len(span):>6}  {loss:<5}{decile:<3}"
        for text in self._lines(span.text):
            colour = COLOURS[span.segment] if span.trained else "2"
            yield f"{head:<{GUTTER - 2}}{self.mark_edge} {self._paint(colour, text)}"
            head = ""

    def _unrendered(self, picture: Picture) -> Iterator[str]:
        """What the template makes of a record that it cannot write."""
        from lit_reason.data.inspection.xray import as_written

        text = as_written(self.renderer, picture.conversation)
        head = "  as the template writes it"
        for line in self._lines(text) if text else ():
            yield f"{head:<{GUTTER - 2}}{self.mark_edge} {line}"
            head = ""

    def _lines(self, text: str) -> Iterator[str]:
        """A text in lines that fit, its line breaks marked, nothing in it that a terminal would obey."""
        if not self.full and len(text) > LONGEST:
            left_out = len(text) - LONGEST
            yield from self._lines(text[: LONGEST * 2 // 3])
            yield self._paint("2", f"[{left_out:,} characters left out]")
            yield from self._lines(text[-LONGEST // 3 :])
            return
        room = self.width - GUTTER
        for line in re.findall(r"[^\n]*\n+|[^\n]+", text) or [""]:
            shown = printable(line.rstrip("\n")) + self.mark_line * (len(line) - len(line.rstrip("\n")))
            for at in range(0, max(len(shown), 1), room):
                yield shown[at : at + room]

    # ---- summary

    def summary(self, scan: Scan) -> None:
        """Print what the whole file came to.

        Args:
            scan: after its last row.
        """
        tally = scan.tally
        lines = [self._paint("1", f"summary of {', '.join(scan.paths)}")]
        lines += [f"  {name:<12}{text}" for name, text in facts(scan)]
        if scan.unusable.total:
            lines += [f"  {printable(line)}" for line in scan.unusable.summary().splitlines()]
        lines += ["", f"  {'segment':<15}{'tokens':>12}{'share':>9}{'trained':>12}"]
        lines += [f"  {name:<15}{count:>12,}{part:>9.1%}{loss:>12,}" for name, count, part, loss in by_segment(tally)]
        if scan.notes:
            lines += ["", "  template", *(f"    {note}" for note in scan.notes)]
        lines += ["", *self._findings(tally)]
        self._print("\n".join(lines))

    def _findings(self, tally: Tally) -> Iterator[str]:
        from lit_reason.data.inspection.xray import KINDS

        if not tally.failed:
            yield self._paint("32", f"  {self.mark_good} no findings")
            return
        yield self._bad(f"  {self.mark_bad} findings in {tally.failed:,} of {tally.records:,} records")
        for kind, sentence in KINDS.items():
            if kind not in tally.findings:
                continue
            yield self._bad(f"    {tally.findings[kind]:,} x {sentence}")
            for finding in tally.examples[kind]:
                yield f"      {printable(f'{finding.row_id}: {finding.detail}')}"
            more = tally.findings[kind] - len(tally.examples[kind])
            if more > 0:
                yield f"      and {more:,} more"

    # ---- output

    def _paint(self, code: str, text: str) -> str:
        return f"\033[{code}m{text}\033[0m" if self.colour and text else text

    def _bad(self, text: str) -> str:
        return self._paint("31", printable(text))

    def _print(self, text: str) -> None:
        from tqdm import tqdm

        safe = text.encode(self.encoding, "backslashreplace").decode(self.encoding)
        tqdm.write(safe, file=self.out)


def facts(scan: Scan) -> Iterator[tuple[str, str]]:
    """What the summary says in words, as pairs of name and text.

    Args:
        scan: after its last row.
    """
    tally = scan.tally
    middle, long, longest = (tally.length_at(share) for share in (0.5, 0.9, 1.0))
    yield "records", f"{tally.records + scan.unusable.total:,}"
    yield "rows", f"{tally.rows:,} to train on"
    yield "tokens", f"{tally.tokens.sum():,}, of which {tally.trained.sum():,} trained ({tally.trained_share:.1%})"
    yield "lengths", f"p50 {middle:,}, p90 {long:,}, max {longest:,} tokens"
    yield "over length", f"{tally.over:,} rows longer than max_length {scan.data.max_length:,}"
    for reason, count in tally.dropped.items():
        yield "left out", f"{count:,} records {reason}"
    thoughts = scan.condenser.ledger.thoughts
    if thoughts["traces"]:
        yield "thoughts", f"{thoughts['before']:,} in {thoughts['traces']:,} traces, {thoughts['after']:,} kept"


def by_segment(tally: Tally) -> list[tuple[str, int, float, int]]:
    """Name, tokens, share of all tokens and trained tokens of each segment that occurs.

    Args:
        tally: of a scan.
    """
    total = max(int(tally.tokens.sum()), 1)
    return [
        (name.replace("_", " "), int(count), int(count) / total, int(loss))
        for name, count, loss in zip(SEGMENT_NAMES, tally.tokens, tally.trained, strict=True)
        if count
    ]


def wants_colour(out: TextIO) -> bool:
    """Whether to print in colour: to a terminal that can, unless NO_COLOR is set to anything.

    Args:
        out: where to print.
    """
    return out.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def printable(text: str) -> str:
    """A text without characters that a terminal would obey: escapes are shown as they are spelt.

    Args:
        text: anything from a data set.
    """
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
