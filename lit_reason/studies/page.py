"""What a study leaves: `results.json`, `results.csv`, tables as text, and a page with plots."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lit_reason.core.plots import COLOURS, Curve, Figure, line_plot
from lit_reason.core.report import Interval, ReportData, Section, Table, render_report
from lit_reason.data.reading.row_files import complete_or_absent
from lit_reason.studies.plan import Study, cells
from lit_reason.studies.results import CellResult, Row, rows
from lit_reason.studies.table import cells_of, comma_separated, headings, markdown, sections, shown, text

PACKAGES = ("lit-reason", "torch", "lightning", "transformers", "numpy")
HOW_TO_READ = (
    "Score: mean over seeds. Interval: from the lowest to the highest end of the seeds' 95 % intervals over problems, "
    "so it covers both. Gap: against the reference with the same seed. Ratios are to the reference. CPU seconds are "
    "those of training steps, without generation."
)


def write_outcome(
    study: Study, results: Sequence[CellResult], out: Path, *, command: str = "", page: bool = True
) -> str:
    """Write everything into the study's folder.

    Args:
        study: the study.
        results: finished cells.
        out: the folder.
        command: what was run.
        page: draw the page as well.

    Returns:
        The table as text.
    """
    table = rows(study, results)
    said = text(study, table)
    facts = {
        "command": command,
        "date": datetime.date.today().isoformat(),
        "versions": {name: version(name) for name in PACKAGES},
        "finished": f"{len(results)} of {len(cells(study))} runs",
        "study": asdict(study) | {"recipe": Path(study.recipe).name},
        "rows": [asdict(row) | {"score": row.score, "envelope": row.envelope, "gap": row.gap} for row in table],
        "cells": [asdict(result) for result in results],
    }
    files = {
        "results.json": json.dumps(facts, indent=1) + "\n",
        "results.csv": comma_separated(table),
        "results.md": markdown(study, table) + "\n",
        "results.txt": said + "\n",
    }
    if page:
        files["report.html"] = render_report(study_page(study, results, table, command))
    for name, content in files.items():
        with complete_or_absent(out / name) as unfinished:
            unfinished.write_text(content, encoding="utf-8")
    return said


def study_page(study: Study, results: Sequence[CellResult], table: Sequence[Row], command: str = "") -> ReportData:
    """The page of a study.

    Args:
        study: the study.
        results: finished cells.
        table: their rows.
        command: shown at the end.
    """
    parts = [_part(study, title, part) for title, part in sections(study, table)]
    figures = [*_by_task(study, table), *_by_place(study, table)]
    return ReportData(
        study.name or "Study",
        kicker=(
            f"{len(study.arms)} arms",
            f"{len(study.tasks)} tasks" if len(study.tasks) > 1 else next(iter(study.tasks)),
            f"seeds {', '.join(str(seed) for seed in study.seeds)}",
            f"{len(results)} of {len(cells(study))} runs finished",
        ),
        status="finished" if len(results) == len(cells(study)) else "running",
        verdict=HOW_TO_READ,
        sections=[Section("Across tasks and settings", figures=figures), *parts],
        footer=command,
    )


def _part(study: Study, title: str, part: Sequence[Row]) -> Section:
    head = headings(study)
    grid: list[list[Any]] = [list(cells_of(study, row)) for row in part]
    if _is_share(study):  # one cell shows a share and its interval
        head.pop(2)
        for line, row in zip(grid, part, strict=True):
            line.pop(2)
            line[1] = line[1] if row.envelope is None else Interval(row.score, *row.envelope)
    figures = [_cost_plot(study, title, part, "trained_tokens", "trained tokens")]
    figures.append(_cost_plot(study, title, part, "cpu_seconds", "CPU seconds of training"))
    table = Table(head, grid, text_columns=2)
    return Section(title.capitalize(), tables=[table], figures=[figure for figure in figures if figure])


def _cost_plot(study: Study, title: str, part: Sequence[Row], cost: str, label: str) -> Figure | None:
    """Score against cost: one dot an arm, as far as there are colours, with its interval."""
    curves = [
        Curve(row.arm, [(row.costs[cost], row.score)], colour, markers=True, band=_whisker(row, cost, part))
        for row, colour in zip(part, COLOURS, strict=False)
        if cost in row.costs
    ]
    note = title if len(part) <= len(COLOURS) else f"{title}; the first {len(COLOURS)} arms"
    return line_plot(f"{study.score} by {label}", curves, x_label=label, percent=_is_share(study), note=note)


def _whisker(row: Row, cost: str, part: Sequence[Row]) -> list[tuple[float, float, float]]:
    """The interval as a band a few pixels wide around the dot."""
    if row.envelope is None:
        return []
    at, width = row.costs[cost], 0.004 * max(other.costs.get(cost, 0.0) for other in part)
    return [(at - width, *row.envelope), (at + width, *row.envelope)]


def _by_task(study: Study, table: Sequence[Row]) -> Iterator[Figure]:
    """Score along the tasks' axis, one curve an arm."""
    for budget in sorted(study.budgets):
        curves = []
        for arm, colour in zip(study.arms, _colours(), strict=False):
            points = [
                (float(at), row)
                for row in table
                if (row.arm, row.budget) == (arm, budget) and (at := study.tasks[row.task].at) is not None
            ]
            curves.append(_curve(arm, points, colour))
        note = f"Equal {budget}; shaded: interval."
        label = study.task_axis or "task"
        if figure := line_plot(f"{study.score} by {label}", curves, x_label=label, percent=_is_share(study), note=note):
            yield figure


def _by_place(study: Study, table: Sequence[Row]) -> Iterator[Figure]:
    """Score along the arms' axis, one curve a series."""
    names = list(dict.fromkeys(arm.series for arm in study.arms.values() if arm.at is not None))
    label = study.axis or "place"
    for title, part in sections(study, table):
        curves = []
        for name, colour in zip(names, _colours(), strict=False):
            points = [
                (float(at), row)
                for row in part
                if study.arms[row.arm].series == name and (at := study.arms[row.arm].at) is not None
            ]
            curves.append(_curve(name or "", points, colour))
        if figure := line_plot(
            f"{study.score} by {label}", curves, x_label=label, percent=_is_share(study), note=title
        ):
            yield figure


def _curve(label: str, points: Sequence[tuple[float, Row]], colour: str) -> Curve:
    ordered = sorted(points, key=lambda point: point[0])
    band = [(at, *row.envelope) for at, row in ordered if row.envelope is not None]
    return Curve(label, [(at, row.score) for at, row in ordered], colour, markers=True, band=band)


def _colours() -> Iterator[str]:
    while True:
        yield from COLOURS


def _is_share(study: Study) -> bool:
    return shown(study.score)(0.5) == "50.0"
