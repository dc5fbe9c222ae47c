"""Plots as inline SVG that follows the page: text and colours come from its style sheet, light or dark."""

from __future__ import annotations

import hashlib
import io
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import matplotlib
from markupsafe import Markup, escape
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import FuncFormatter, MaxNLocator

Point = tuple[float, float]

COLOURS = ("c1", "c2", "c3", "c4", "c5", "c6", "c7", "c8")  # style-sheet variables, used in this order
WIDTH, HEIGHT = 4.2, 2.35  # inches; shown at about that size, so that text keeps its size
MOST_POINTS = 240  # a curve is thinned to this many points
FAINTEST, STRONGEST = 0.1, 0.8  # opacity of the lowest and of the highest value of a field
SMOOTH_FROM = 40  # points from which a running mean is drawn over a noisy curve

# Colours that stand for style-sheet variables while matplotlib draws; no other colour occurs.
_STAND_INS = {name: f"#0a0b{i:02x}" for i, name in enumerate((*COLOURS, "ink", "muted", "line", "card"))}


@dataclass(frozen=True)
class Curve:
    """One curve of a plot.

    Attributes:
        label: name in the legend.
        points: `(x, y)` in order of x; finite.
        colour: style-sheet variable, one of `COLOURS` or `muted`.
        smooth: draw a running mean over the faint points when there are many.
        markers: draw a dot at every point (few, costly measurements).
        dashed: draw with dashes.
        band: `(x, low, high)` shaded behind the curve.
    """

    label: str
    points: Sequence[Point]
    colour: str = "c1"
    smooth: bool = False
    markers: bool = False
    dashed: bool = False
    band: Sequence[tuple[float, float, float]] = ()


class Key(NamedTuple):
    """One entry of a legend.

    Attributes:
        label: what the colour stands for.
        colour: style-sheet variable.
        value: shown beside it; may be empty.
        strength: how opaque the colour is, from 0 to 1.
    """

    label: str
    colour: str
    value: str = ""
    strength: float = 1.0


@dataclass(frozen=True)
class Figure:
    """A drawn plot with its caption, ready for a page.

    Attributes:
        title: what is shown.
        unit: what the vertical axis counts.
        svg: the drawing.
        legend: of a curve with its newest value, averaged over the last few points of a noisy one.
        note: one sentence below the plot; may be empty.
    """

    title: str
    unit: str
    svg: Markup
    legend: tuple[Key, ...] = ()
    note: str = ""


def line_plot(
    title: str,
    curves: Sequence[Curve],
    *,
    unit: str = "",
    note: str = "",
    x_label: str = "optimizer step",
    percent: bool = False,
    from_zero: bool = False,
) -> Figure | None:
    """Draw curves over steps.

    Args:
        title: what is shown.
        curves: those without points are left out.
        unit: what the vertical axis counts.
        note: one sentence below the plot.
        x_label: what the horizontal axis counts.
        percent: values are shares of 1, shown as percent on an axis from 0 to 100.
        from_zero: the vertical axis starts at 0.

    Returns:
        The plot; None when no curve has points.
    """
    curves = [curve for curve in curves if curve.points]
    if not curves:
        return None
    with matplotlib.rc_context(_STYLE):
        canvas, axes = _axes()
        for curve in curves:
            _draw(axes, curve)
        if percent:
            axes.set_ylim(0, 1.02)
        elif from_zero:
            top = max(y for curve in curves for _, y in curve.points)
            axes.set_ylim(0, top * 1.1 if top > 0 else 1.0)
        axes.margins(x=0.02)
        axes.set_xlabel(x_label, loc="right", color=_STAND_INS["muted"], fontsize=8.5)
        counts = all(float(x).is_integer() for curve in curves for x, _ in curve.points)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=counts))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: short(x)))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:.0%}" if percent else short(y)))
        svg = _svg(canvas, title)
    legend = tuple(Key(c.label, c.colour, _newest(c, percent)) for c in curves)
    return Figure(title, unit, svg, legend, note)


def bar_plot(
    title: str,
    names: Sequence[str],
    groups: Sequence[tuple[str, str, Sequence[float | None]]],
    *,
    unit: str = "",
    note: str = "",
    x_label: str = "",
) -> Figure | None:
    """Draw groups of bars side by side.

    Args:
        title: what is shown.
        names: names under the bars.
        groups: `(label, colour, values)`, one value a name; None leaves the place empty.
        unit: what the vertical axis counts.
        note: one sentence below the plot.
        x_label: what the names stand for.

    Returns:
        The plot; None when there is no value at all.
    """
    groups = [group for group in groups if any(value is not None for value in group[2])]
    if not groups:
        return None
    with matplotlib.rc_context(_STYLE):
        canvas, axes = _axes()
        wide = 0.78 / len(groups)
        for g, (_, colour, values) in enumerate(groups):
            places = [(i, v) for i, v in enumerate(values) if v is not None]
            shift = (g - (len(groups) - 1) / 2) * wide
            axes.bar(
                [i + shift for i, _ in places],
                [v for _, v in places],
                width=wide * 0.9,
                color=_STAND_INS[colour],
            )
        axes.set_xticks(range(len(names)), [str(name) for name in names])
        axes.set_xlabel(x_label, loc="right", color=_STAND_INS["muted"], fontsize=8.5)
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: short(y)))
        svg = _svg(canvas, title)
    return Figure(title, unit, svg, tuple(Key(label, colour) for label, colour, _ in groups), note)


def simplex_plot(
    title: str,
    corners: Sequence[str],
    field: Sequence[tuple[Sequence[float], float]],
    marks: Sequence[tuple[Sequence[float], str]],
    *,
    unit: str = "",
    note: str = "",
) -> Figure:
    """Draw values over all mixes of three things, and some mixes that are marked.

    Args:
        title: what is shown.
        corners: names of the three.
        field: mixes of three shares each and their values, drawn the stronger the higher.
        marks: mixes with a few letters each; the last one stands out.
        unit: what the values count.
        note: one sentence below the plot.
    """
    at = ((0.0, 0.0), (1.0, 0.0), (0.5, 0.866))
    low, high = min(value for _, value in field), max(value for _, value in field)

    def place(mix: Sequence[float]) -> tuple[float, float]:
        return sum(w * x for w, (x, _) in zip(mix, at, strict=True)), sum(
            w * y for w, (_, y) in zip(mix, at, strict=True)
        )

    with matplotlib.rc_context(_STYLE):
        canvas, axes = _axes()
        axes.set_position((0.02, 0.02, 0.96, 0.96))
        axes.set_axis_off()
        axes.set_aspect("equal")
        axes.set_xlim(-0.55, 1.55)
        axes.set_ylim(-0.13, 1.0)
        for mix, value in field:
            strength = FAINTEST + (STRONGEST - FAINTEST) * (value - low) / ((high - low) or 1.0)
            axes.plot(*place(mix), "h", markersize=9, color=_STAND_INS["c1"], alpha=strength, markeredgewidth=0)
        for number, (mix, text) in enumerate(marks):
            size = 9 if number == len(marks) - 1 else 5
            axes.plot(*place(mix), "o", markersize=size, color=_STAND_INS["c2"], markeredgewidth=0)
            axes.annotate(text, place(mix), (6, 3), textcoords="offset points", fontsize=8, color=_STAND_INS["ink"])
        for corner, name, side in zip(at, corners, ((0, -12), (0, -12), (0, 7)), strict=True):
            quiet = {"ha": "center", "fontsize": 8.5, "color": _STAND_INS["muted"]}
            axes.annotate(name, corner, side, textcoords="offset points", **quiet)
        svg = _svg(canvas, title)
    legend = (Key("lowest", "c1", short(low), FAINTEST), Key("highest", "c1", short(high), STRONGEST))
    return Figure(title, unit, svg, legend, note)


def short(value: float) -> str:
    """A number in few characters: 0.004, 1.25, 940, 12.5k, 3.2M."""
    size = abs(value)
    for unit, name in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= unit:
            return f"{value / (1e3 if name == 'k' else unit):.3g}{name}" if size < 1e15 else f"{value:.2g}"
    return f"{value:.0f}" if value == round(value) else f"{value:.3g}"


def thin(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """At most about `most` points: means of equal runs of neighbours; the last point is kept as it is.

    Args:
        points: `(x, y)` in order of x.
        most: wanted number.
    """
    run = -(-len(points) // most)
    if run <= 1:
        return list(points)
    parts = [points[i : i + run] for i in range(0, len(points) - 1, run)]
    return [(sum(x for x, _ in p) / len(p), sum(y for _, y in p) / len(p)) for p in parts] + [points[-1]]


def running_mean(points: Sequence[Point], reach: int) -> list[Point]:
    """Each value averaged with up to `reach` neighbours on each side.

    Args:
        points: `(x, y)` in order of x.
        reach: neighbours on each side.
    """
    sums = [0.0]
    for _, y in points:
        sums.append(sums[-1] + y)
    out = []
    for i, (x, _) in enumerate(points):
        low, high = max(0, i - reach), min(len(points), i + reach + 1)
        out.append((x, (sums[high] - sums[low]) / (high - low)))
    return out


def _newest(curve: Curve, percent: bool) -> str:
    """The newest value for the legend; of a noisy curve, the end of its running mean."""
    few = curve.points[-len(curve.points) // 24 :] if curve.smooth else curve.points[-1:]
    value = sum(y for _, y in few) / len(few)
    return f"{value:.0%}" if percent else short(value)


_STYLE: Any = {
    "svg.hashsalt": "lit-reason",  # the same plot gives the same text
    "svg.fonttype": "none",  # text stays text: it takes the page's font and colour
    "text.parse_math": False,
    "axes.unicode_minus": False,
    "axes.spines.left": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _STAND_INS["line"],
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": _STAND_INS["line"],
    "grid.linewidth": 0.8,
    "xtick.color": _STAND_INS["line"],
    "ytick.color": _STAND_INS["line"],
    "xtick.labelcolor": _STAND_INS["muted"],
    "ytick.labelcolor": _STAND_INS["muted"],
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}


def _axes():
    canvas = Canvas(figsize=(WIDTH, HEIGHT))
    FigureCanvasSVG(canvas)
    axes = canvas.add_axes((0.1, 0.18, 0.87, 0.77))
    axes.set_axisbelow(True)
    return canvas, axes


def _draw(axes, curve: Curve) -> None:
    colour = _STAND_INS[curve.colour]
    points = list(curve.points) if curve.markers else thin(curve.points)
    style = (0, (3, 2)) if curve.dashed else "solid"
    if curve.band:
        x, low, high = zip(*curve.band, strict=True)
        axes.fill_between(x, low, high, color=colour, alpha=0.16, linewidth=0)
    if curve.smooth and len(points) >= SMOOTH_FROM:
        axes.plot(*zip(*points, strict=True), color=colour, alpha=0.28, linewidth=0.8)
        points = running_mean(points, len(points) // 24)
    marker = {"marker": "o", "markersize": 4} if curve.markers or len(points) == 1 else {}
    axes.plot(*zip(*points, strict=True), color=colour, linestyle=style, **marker)


def _svg(canvas: Canvas, title: str) -> Markup:
    """The drawing as an `<svg>` element whose ids do not clash with those of other plots on the page."""
    file = io.StringIO()
    with warnings.catch_warnings():
        # matplotlib's font lacks many scripts; the browser, which draws the text, does not.
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from")
        canvas.savefig(file, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = file.getvalue()
    body = text[text.index(">", text.index("<svg")) + 1 :]
    body = re.sub(r"<metadata>.*?</metadata>|<defs>\s*<style.*?</style>\s*</defs>|<!--.*?-->", "", body, flags=re.S)
    body = re.sub(r"font-family: [^;]*; ", "", body)  # the page's own
    prefix = f"p{hashlib.sha256(f'{title}{body}'.encode('utf-8', 'replace')).hexdigest()[:8]}-"
    body = re.sub(r'\bid="', f'id="{prefix}', body)
    body = body.replace("url(#", f"url(#{prefix}").replace('xlink:href="#', f'href="#{prefix}')
    for name, stand_in in _STAND_INS.items():
        body = body.replace(stand_in, f"var(--{name})")
    box = f"0 0 {WIDTH * 72:.0f} {HEIGHT * 72:.0f}"
    return Markup(f'<svg class="plot" viewBox="{box}" role="img" aria-label="{escape(title)}">{body}')
