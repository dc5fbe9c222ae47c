"""Pages people look at: building blocks, and the functions that make one self-contained HTML file of them.

A page is data (`ReportData`) and a template; nothing here knows a trainer, a model or a file.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, Template

from lit_reason.core.plots import COLOURS, Curve, Figure, line_plot

NBSP = "\u00a0"  # keeps a number and its unit on one line
LONGEST_TEXT = 1800  # characters of a prompt or completion that are shown


@dataclass(frozen=True)
class Interval:
    """A share between 0 and 1 with its confidence interval, shown as a dot on a range.

    Attributes:
        value: the estimate.
        low: lower end.
        high: upper end.
    """

    value: float
    low: float
    high: float

    @property
    def percent(self) -> str:
        """The estimate alone: `62 %`."""
        return share(self.value)

    @property
    def span(self) -> str:
        """The interval alone: `52 to 71`."""
        return f"{100 * self.low:.0f} to {100 * self.high:.0f}"

    @property
    def text(self) -> str:
        """Both in words."""
        return f"{self.percent}, interval {self.span}"

    @property
    def left(self) -> str:
        """Where the range begins, in percent of the bar."""
        return f"{100 * min(max(self.low, 0.0), 1.0):.1f}"

    @property
    def width(self) -> str:
        """How wide the range is, in percent of the bar."""
        return f"{100 * max(min(self.high, 1.0) - max(self.low, 0.0), 0.0):.1f}"

    @property
    def at(self) -> str:
        """Where the estimate lies, in percent of the bar."""
        return f"{100 * min(max(self.value, 0.0), 1.0):.1f}"


@dataclass(frozen=True)
class Tile:
    """One number at the top of the page.

    Attributes:
        label: what it is.
        value: the number with its unit.
        note: a few words below it.
        interval: shown as a range below the number.
    """

    label: str
    value: str
    note: str = ""
    interval: Interval | None = None


@dataclass(frozen=True)
class Table:
    """A table; wide ones scroll.

    Attributes:
        columns: headings; empty for a table without a head.
        rows: cells: text, numbers, `Interval`, or None for an empty place.
        title: heading of the table.
        note: one sentence below it.
        text_columns: so many columns from the left hold words; the others hold numbers and stand right.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    title: str = ""
    note: str = ""
    text_columns: int = 1


@dataclass(frozen=True)
class Sample:
    """A prompt and what the model answered.

    Attributes:
        prompt: the question.
        completion: the answer as sampled.
        right: whether a checker accepted it; None when nobody checked.
        title: where the prompt comes from.
        note: for instance the expected answer.
    """

    prompt: str
    completion: str
    right: bool | None = None
    title: str = ""
    note: str = ""

    @property
    def verdict(self) -> str:
        """Style class: `right`, `wrong` or `unchecked`."""
        return "unchecked" if self.right is None else "right" if self.right else "wrong"

    @property
    def sign(self) -> str:
        """The verdict for readers, not by colour alone."""
        return {"right": "✓ right", "wrong": "✗ wrong", "unchecked": "not checked"}[self.verdict]


@dataclass(frozen=True)
class Piece:
    """A stretch of a labelled text.

    Attributes:
        text: its words.
        label: what it is, shown before it; empty shows none.
        colour: style-sheet variable, one of `COLOURS`, `above`, `below` or `muted`.
        size: how wide it stands in the strip above the text.
        faint: shown as background rather than substance.
        strength: how strongly it is coloured, from 0 to 1; None colours all pieces alike.
    """

    text: str
    label: str
    colour: str = "muted"
    size: int = 1
    faint: bool = False
    strength: float | None = None

    @property
    def style(self) -> str:
        """Its colour, and how strong it is behind the text and in the strip, for the style sheet."""
        if self.strength is None:
            return f"--c:var(--{self.colour})"
        return f"--c:var(--{self.colour});--s:{4 + 41 * self.strength:.0f}%;--m:{12 + 88 * self.strength:.0f}%"


@dataclass(frozen=True)
class Scale:
    """Legend of a diverging scale of colours, from `below` over nothing to `above`.

    Attributes:
        low: what stands at its lower end.
        middle: in its middle.
        high: at its upper end.
    """

    low: str
    middle: str
    high: str


@dataclass(frozen=True)
class Passage:
    """A text cut into labelled pieces, with a strip that shows them in proportion.

    Attributes:
        title: its name.
        facts: a few words each, beside the name.
        pieces: in order.
        alarms: what is wrong with it.
    """

    title: str
    facts: Sequence[str] = ()
    pieces: Sequence[Piece] = ()
    alarms: Sequence[str] = ()


@dataclass(frozen=True)
class Section:
    """A part of the page with a heading; what it lacks is left out.

    Attributes:
        title: heading.
        note: one or two sentences below it.
        figures: plots, side by side.
        tables: tables.
        samples: prompts with completions.
        passages: texts in labelled pieces.
        scale: legend of the pieces' colours.
        text: preformatted text.
        folded: shown as a line that opens on a click.
    """

    title: str
    note: str = ""
    figures: Sequence[Figure] = ()
    tables: Sequence[Table] = ()
    samples: Sequence[Sample] = ()
    passages: Sequence[Passage] = ()
    scale: Scale | None = None
    text: str = ""
    folded: bool = False

    @property
    def empty(self) -> bool:
        """Whether there is nothing under the heading."""
        return not (self.figures or self.tables or self.samples or self.passages or self.text)


@dataclass(frozen=True)
class ReportData:
    """Everything a page shows.

    Attributes:
        title: heading of the page.
        kicker: short facts above the heading.
        status: `finished`, `running`, `stopped` or `failed`; empty shows none.
        verdict: one or two sentences that say what happened.
        alarm: what went wrong, in red.
        tiles: the numbers at the top.
        sections: the parts of the page; empty ones are left out.
        footer: last line.
    """

    title: str
    kicker: Sequence[str] = ()
    status: str = ""
    verdict: str = ""
    alarm: str = ""
    tiles: Sequence[Tile] = ()
    sections: Sequence[Section] = ()
    footer: str = ""


def render_report(report: ReportData) -> str:
    """The page as one HTML document without scripts and without anything to load from elsewhere.

    Args:
        report: what it shows. All text in it is escaped: model output cannot become markup.

    Returns:
        The document; it encodes to UTF-8.
    """
    shown = [section for section in report.sections if not section.empty]
    page = _template().render(r=dataclasses.replace(report, sections=shown))
    return _UNPRINTABLE.sub("\ufffd", page)


def render_comparison(
    title: str,
    rows: Sequence[Mapping[str, Any]],
    curves: Mapping[str, Sequence[tuple[float, float]]] | None = None,
    notes: Sequence[str] = (),
) -> str:
    """A page that sets several runs (arms) side by side.

    Args:
        title: heading of the page.
        rows: one mapping an arm. Known keys, each optional: `name`, `accuracy` with `accuracy_low` and
            `accuracy_high` (shares of 1), `trained_tokens`, `seconds`, `time_saved` (share of 1, against the
            arm the caller compares with), `loss`. Any other key becomes a column of its own.
        curves: by arm, `(optimizer step, training loss)`.
        notes: how to read the table, what was held equal; the first is shown below the title, all others
            below it in the section.

    Returns:
        The HTML document.
    """
    plots = [
        Curve(name, list(points), COLOURS[i % len(COLOURS)], smooth=True)
        for i, (name, points) in enumerate((curves or {}).items())
    ]
    figure = line_plot("Training loss by arm", plots, unit="nats a token")
    sections = [
        Section("Arms", " ".join(notes[1:]), tables=[comparison_table(rows)] if rows else []),
        Section("Learning", figures=[figure] if figure else []),
    ]
    return render_report(ReportData(title, verdict=notes[0] if notes else "", sections=sections))


def comparison_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The table of `render_comparison`, for pages that hold it among other things.

    Args:
        rows: see `render_comparison`.
    """
    known = {
        "name": ("arm", lambda row: row.get("name")),
        "accuracy": ("accuracy (interval)", _accuracy),
        "trained_tokens": ("trained tokens", lambda row: _maybe(row.get("trained_tokens"), lambda v: f"{v:,.0f}")),
        "seconds": ("training time", lambda row: _maybe(row.get("seconds"), duration)),
        "time_saved": ("time saved", lambda row: _maybe(row.get("time_saved"), share)),
        "loss": ("loss", lambda row: _maybe(row.get("loss"), lambda v: f"{v:.3f}")),
    }
    present = dict.fromkeys(key for row in rows for key in row)
    ranges = {"accuracy_low", "accuracy_high"}
    keys = [key for key in known if key in present]
    keys += [key for key in present if key not in known and key not in ranges]
    columns = [known[key][0] if key in known else str(key).replace("_", " ") for key in keys]
    cells = [[known[key][1](row) if key in known else _plain(row.get(key)) for key in keys] for row in rows]
    words = sum(key in ("name", "accuracy") for key in keys)
    return Table(columns, cells, text_columns=words)


def _accuracy(row: Mapping[str, Any]) -> Interval | str | None:
    value, low, high = (row.get(key) for key in ("accuracy", "accuracy_low", "accuracy_high"))
    if value is None:
        return None
    return share(value) if low is None or high is None else Interval(value, low, high)


def _maybe(value: Any, show: Any) -> Any:
    return None if value is None else show(value)


def _plain(value: Any) -> Any:
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if type(value) is int else value


def count(number: float) -> str:
    """A count with thousands apart, or in millions: 812, 41,203, 3.42 M."""
    for unit, name in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if abs(number) >= unit:
            return f"{number / unit:.3g}{NBSP}{name}"
    return f"{number:,.0f}"


def duration(seconds: float) -> str:
    """A time: 0.84 s, 12.5 s, 3 min 20 s, 2 h 05 min."""
    if seconds < 59.95:
        return f"{seconds:.3g}{NBSP}s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}{NBSP}min{NBSP}{rest:02d}{NBSP}s"
    return f"{minutes // 60}{NBSP}h{NBSP}{minutes % 60:02d}{NBSP}min"


def share(value: float) -> str:
    """A share of 1 in percent: 62 %, 3.1 %."""
    return f"{100 * value:.3g}{NBSP}%"


def clip(text: str, longest: int = LONGEST_TEXT) -> str:
    """The text, its middle replaced by how many characters are missing when it is too long.

    Args:
        text: what the model read or wrote.
        longest: characters that are shown.
    """
    if len(text) <= longest:
        return text
    head = longest * 2 // 3
    return f"{text[:head]}\n… {len(text) - longest:,} characters left out …\n{text[head - longest :]}"


_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


@cache
def _template() -> Template:
    environment = Environment(
        loader=PackageLoader("lit_reason", "core"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("report.html.jinja")
