"""The table of a study as text, as CSV, and as Markdown."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence

from lit_reason.studies.plan import Study
from lit_reason.studies.results import COSTS, Row

SHARES = ("val/pass@", "val/closed", "val/ended", "val/traced", "val/repetition")  # metrics shown in percent


def headings(study: Study) -> list[str]:
    """Headings of the table's columns."""
    return [
        "arm",
        study.score,
        "interval",
        "by seed",
        "gap",
        "trained tokens",
        "ratio",
        "CPU s",
        "ratio",
        *study.columns,
    ]


def cells_of(study: Study, row: Row) -> list[str]:
    """One row in words.

    Args:
        study: gives score and columns.
        row: the figures.
    """
    score = shown(study.score)
    interval = "" if row.envelope is None else f"{score(row.envelope[0])} to {score(row.envelope[1])}"
    return [
        row.arm,
        score(row.score),
        interval,
        " ".join(score(value) for value in row.scores.values()),
        "" if row.gap is None else signed(study.score, row.gap),
        _maybe(row.costs.get("trained_tokens"), "{:,.0f}"),
        _maybe(row.ratios.get("trained_tokens"), "{:.2f}"),
        _maybe(row.costs.get("cpu_seconds"), "{:.1f}"),
        _maybe(row.ratios.get("cpu_seconds"), "{:.2f}"),
        *(shown(metric)(row.columns[name]) if name in row.columns else "" for name, metric in study.columns.items()),
    ]


def shown(metric: str) -> Callable[[float], str]:
    """How values of a metric are written: shares in percent, others in three digits.

    Args:
        metric: its name in `metrics.csv`.
    """
    if metric.startswith(SHARES):
        return lambda value: f"{100 * value:.1f}"
    return lambda value: f"{value:.3g}"


def signed(metric: str, difference: float) -> str:
    """A difference between two values of a metric, with its sign."""
    text = shown(metric)(difference)
    return text if text.startswith("-") else f"+{text}"


def _maybe(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def sections(study: Study, table: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    """The rows by task and budget, each part with its title; without parts that hold the reference alone.

    Args:
        study: gives the order.
        table: all rows.
    """
    found = []
    for task in study.tasks:
        for budget in sorted(study.budgets):
            part = [row for row in table if (row.task, row.budget) == (task, budget)]
            if any(row.arm != study.reference for row in part) or (part and len(study.arms) == 1):
                found.append((f"{task}, equal {budget}", part))
    return found


def text(study: Study, table: Sequence[Row]) -> str:
    """Aligned columns for a terminal.

    Args:
        study: the study.
        table: its rows.
    """
    parts = []
    for title, part in sections(study, table):
        grid = [headings(study), *(cells_of(study, row) for row in part)]
        widths = [max(len(line[i]) for line in grid) for i in range(len(grid[0]))]
        lines = [
            "  ".join(
                f"{cell:<{w}}" if i == 0 else f"{cell:>{w}}"
                for i, (cell, w) in enumerate(zip(line, widths, strict=True))
            )
            for line in grid
        ]
        parts.append("\n".join([title, *(line.rstrip() for line in lines)]))
    return "\n\n".join(parts)


def markdown(study: Study, table: Sequence[Row]) -> str:
    """Tables for a Markdown page.

    Args:
        study: the study.
        table: its rows.
    """
    parts = []
    for title, part in sections(study, table):
        head = headings(study)
        lines = [f"| {' | '.join(head)} |", f"|---|{'---:|' * (len(head) - 1)}"]
        lines += [f"| {' | '.join(cells_of(study, row))} |" for row in part]
        parts.append("\n".join([f"**{title}**", "", *lines]))
    return "\n\n".join(parts)


def comma_separated(table: Sequence[Row]) -> str:
    """One line a row, plain numbers, for other programs.

    Args:
        table: the rows.
    """
    columns = list(dict.fromkeys(name for row in table for name in row.columns))
    costs = list(COSTS)
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    head = ["task", "budget", "arm", "seeds", "score", "score_min", "score_max", "low", "high", "gap"]
    writer.writerow([*head, *costs, *(f"{name}_ratio" for name in costs), *columns])
    for row in table:
        low, high = row.envelope or ("", "")
        gap = "" if row.gap is None else row.gap
        writer.writerow(
            [row.task, row.budget, row.arm, len(row.scores), row.score, *row.spread, low, high, gap]
            + [row.costs.get(name, "") for name in costs]
            + [row.ratios.get(name, "") for name in costs]
            + [row.columns.get(name, "") for name in columns]
        )
    return file.getvalue()
