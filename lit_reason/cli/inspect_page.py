"""The page of `lit-reason inspect`: what a file came to, and some of its rows in coloured pieces."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lit_reason.cli.inspect_text import by_segment, facts
from lit_reason.core.plots import Figure, bar_plot
from lit_reason.core.report import Passage, Piece, ReportData, Section, Table, Tile, clip, count, render_report, share
from lit_reason.data.conversation import Trace
from lit_reason.data.inspection.xray import KINDS, Span, as_written, decoded, kept_thoughts, spans
from lit_reason.data.inspection.xray_scan import Picture, Scan, Tally
from lit_reason.data.reading.row_files import complete_or_absent
from lit_reason.data.rendering.render import Renderer
from lit_reason.data.token_row import Segment, TokenRow

COLOURS = {
    Segment.MARKER: "c4",
    Segment.UNDERSTANDING: "c6",
    Segment.EXPLORATION: "c5",
    Segment.CONVERGENCE: "c3",
    Segment.SEAM: "c2",
    Segment.SOLUTION: "c1",
    Segment.END: "c7",
    Segment.TOOL_CALL: "c8",
    Segment.TEXT: "c1",
}
BINS = 12  # bars of the plot of lengths
LONGEST = 4000  # characters of a span that are shown


def write_page(path: Path, scan: Scan, shown: Sequence[Picture]) -> Path:
    """Write the page.

    Args:
        path: the HTML file.
        scan: after its last row.
        shown: the records to show.

    Returns:
        The file.
    """
    tally = scan.tally
    condense = scan.condenser.config
    page = ReportData(
        "X-ray",
        kicker=(", ".join(Path(p).name for p in scan.paths), f"strategy {condense.strategy}, tau {condense.tau:g}"),
        status="failed" if tally.failed else "finished",
        verdict=_verdict(tally),
        tiles=_tiles(scan),
        sections=[
            _findings(tally),
            Section(
                "Rows",
                "Each piece says what it is, its tokens, and the loss weight of each of them (x1). Pieces without a "
                "loss are grey.",
                passages=[passage for picture in shown for passage in _passages(scan.data.renderer, picture)],
            ),
            Section(
                "The whole file",
                figures=[figure for figure in (_lengths(tally),) if figure],
                tables=[_segments(tally), Table((), list(facts(scan)), text_columns=2)],
            ),
            Section("What the chat template does", text="\n".join(scan.notes)),
        ],
    )
    with complete_or_absent(path) as unfinished:
        unfinished.write_text(render_report(page), encoding="utf-8")
    return path


def _verdict(tally: Tally) -> str:
    if not tally.failed:
        return f"No findings in {tally.records:,} records."
    kinds = ", ".join(f"{KINDS[kind]} ({tally.findings[kind]:,})" for kind in KINDS if kind in tally.findings)
    return f"Findings in {tally.failed:,} of {tally.records:,} records: {kinds}."


def _tiles(scan: Scan) -> list[Tile]:
    tally = scan.tally
    middle, long, longest = (tally.length_at(part) for part in (0.5, 0.9, 1.0))
    return [
        Tile("Rows", count(tally.rows), f"of {tally.records + scan.unusable.total:,} records"),
        Tile("Tokens", count(int(tally.tokens.sum())), f"{share(tally.trained_share)} trained"),
        Tile("Median length", f"{middle:,}", f"p90 {long:,}, max {longest:,}; {tally.over:,} over max_length"),
        Tile("With findings", f"{tally.failed:,}", f"{scan.unusable.total:,} unusable"),
    ]


def _findings(tally: Tally) -> Section:
    rows = [
        (KINDS[kind], f"{tally.findings[kind]:,}", finding.row_id, clip(finding.detail, 300))
        if k == 0
        else ("", "", finding.row_id, clip(finding.detail, 300))
        for kind in KINDS
        for k, finding in enumerate(tally.examples.get(kind, []))
    ]
    columns = ("finding", "records", "row", "what was found")
    tables = [Table(columns, rows, note="The first rows of each kind.", text_columns=4)] if rows else []
    return Section("Findings", tables=tables)


def _segments(tally: Tally) -> Table:
    rows = [(name, f"{n:,}", f"{100 * part:.1f} %", f"{loss:,}") for name, n, part, loss in by_segment(tally)]
    return Table(("segment", "tokens", "share", "trained"), rows, "Tokens by segment")


def _lengths(tally: Tally) -> Figure | None:
    """Rows by length, in bars of equal width."""
    longest = tally.length_at(1.0)
    if not longest:
        return None
    width = -(-longest // BINS)
    bars = [0] * (-(-longest // width))
    for length, number in tally.lengths.items():
        bars[(length - 1) // width] += number
    names = [f"{(k + 1) * width:,}" if k % 3 == 2 else "" for k in range(len(bars))]
    return bar_plot("Rows by length", names, [("rows", "c1", bars)], x_label="tokens, up to")


def _passages(renderer: Renderer, picture: Picture) -> list[Passage]:
    alarms = [str(finding) for finding in picture.findings]
    extra = [f"thoughts {kept_thoughts(trace)}" for trace in _traces(picture)]
    if picture.reason:
        extra.append(f"not trained on: {picture.reason}")
    if not picture.rows:
        text = clip(as_written(renderer, picture.conversation), LONGEST)
        pieces = [Piece(text, "as the template writes it", faint=True)] if text else []
        return [Passage(picture.row_id, ["not rendered", *extra], pieces, alarms)]
    return [
        Passage(row.row_id, [*_row_facts(row), *extra], _pieces(renderer, row), alarms if k == 0 else ())
        for k, row in enumerate(picture.rows)
    ]


def _traces(picture: Picture) -> list[Trace]:
    messages = picture.conversation.messages if picture.conversation else ()
    return [m.trace for m in messages if m.trained and m.trace]


def _row_facts(row: TokenRow) -> list[str]:
    trained = int((row.weight > 0).sum())
    return [f"{len(row):,} tokens", f"{trained:,} trained ({share(trained / len(row))})"]


def _pieces(renderer: Renderer, row: TokenRow) -> list[Piece]:
    cut = spans(row, lambda ids: decoded(renderer, ids))
    return [
        Piece(clip(s.text, LONGEST), _label(s), COLOURS.get(s.segment, "muted"), len(s), faint=not s.trained)
        for s in cut
    ]


def _label(span: Span) -> str:
    decile = f" d{span.decile}" if span.decile >= 0 else ""
    loss = f"x{span.weight:g}" if span.trained else "no loss"
    return f"{span.name}{decile} · {len(span):,} · {loss}"
