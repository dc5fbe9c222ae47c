"""The page of a trial: success against perplexity, who was steered where, and texts side by side."""

from __future__ import annotations

import json
from pathlib import Path

from lit_reason.core.plots import COLOURS, Curve, line_plot
from lit_reason.core.report import Interval, ReportData, Section, Table, Tile, clip, render_report, share
from lit_reason.data.reading.row_files import complete_or_absent
from lit_reason.regimes.steering.trial_run import Cell, Trial
from lit_reason.steering.direction_file import Directions

SHOWN = 4  # prompts whose continuations stand side by side


def write_trial(trial: Trial, directions: Directions, folder: Path, here: bool = True) -> None:
    """Write `steering.json` and `steering.html`.

    Args:
        trial: what was measured.
        directions: what was tried.
        folder: the run folder.
        here: whether this process writes.
    """
    if not here:
        return
    folder.mkdir(parents=True, exist_ok=True)
    page = render_report(trial_page(trial, directions, "Steering, with and without"))
    for name, text in (("steering.json", json.dumps(trial.as_dict(), indent=1)), ("steering.html", page)):
        with complete_or_absent(folder / name) as unfinished:
            unfinished.write_text(text, encoding="utf-8")
    print(f"trial  {folder / 'steering.html'}")


def trial_page(trial: Trial, directions: Directions, title: str) -> ReportData:
    """The page.

    Args:
        trial: what was measured.
        directions: what was tried.
        title: heading.
    """
    facts, accuracy = directions.facts, ""
    if trial.judge_accuracy is not None:
        chance = share(1 / len(trial.classes))
        accuracy = f" It puts {share(trial.judge_accuracy)} of held-out texts in their class; chance is {chance}."
    return ReportData(
        title=title,
        kicker=[str(facts.get("method", "")), f"layer {directions.layer}", str(facts.get("model", {}).get("id") or "")],
        verdict=_verdict(trial),
        tiles=_tiles(trial),
        sections=[
            Section(
                "Success against perplexity",
                "One point a strength, the first without directions. Success is the share of texts that the judge, "
                f"which knows words and not activations, puts in the wanted class.{accuracy}",
                figures=[figure for figure in (_curves(trial),) if figure],
            ),
            Section("Every strength", tables=[_cells(trial)]),
            Section("Where texts went", "Rows: steered to. Columns: judged as.", tables=[_confusion(trial)]),
            Section("Side by side", tables=_side_by_side(trial)),
            Section("Directions", tables=_directions(directions), folded=True),
        ],
    )


def _verdict(trial: Trial) -> str:
    off, parts = trial.cells[0], []
    for target, cell in trial.chosen.items():
        if cell is None:
            parts.append(f"{target}: even the weakest strength made the texts too surprising")
            continue
        parts.append(
            f"{target}: {share(off.judged[target])} without, "
            f"{share(cell.judged[target])} at strength {cell.strength:g} "
            f"(perplexity {off.perplexity:.1f} to {cell.perplexity:.1f})"
        )
    return ". ".join(parts) + "."


def _tiles(trial: Trial) -> list[Tile]:
    tiles = []
    for target, cell in trial.chosen.items():
        if cell is not None:
            interval = Interval(cell.judged[target], cell.low[target], cell.high[target])
            note = f"strength {cell.strength:g}, {share(trial.cells[0].judged[target])} without"
            tiles.append(Tile(f"judged {target}", interval.percent, note, interval))
    return tiles


def _curves(trial: Trial):
    off = trial.cells[0]
    curves = []
    for i, target in enumerate(trial.chosen):
        cells = sorted([off, *(c for c in trial.cells if c.target == target)], key=lambda c: c.perplexity)
        points = [(c.perplexity, c.judged[target]) for c in cells]
        band = [(c.perplexity, c.low[target], c.high[target]) for c in cells]
        curves.append(Curve(target, points, COLOURS[i % len(COLOURS)], markers=True, band=band))
    note = "the band is the 95 % bootstrap interval over prompts"
    return line_plot("Success", curves, unit="share judged as wanted", note=note, x_label="perplexity", percent=True)


def _cells(trial: Trial) -> Table:
    rows = []
    for cell in trial.cells:
        wanted = cell.target
        success = None if wanted is None else Interval(cell.judged[wanted], cell.low[wanted], cell.high[wanted])
        mark = "◀" if wanted is not None and trial.chosen[wanted] is cell else ""
        numbers = (cell.perplexity, cell.distinct_1, cell.distinct_2, cell.repeating, cell.tokens)
        rows.append([wanted or "none", success, f"{cell.strength:g} {mark}", *(f"{x:.3g}" for x in numbers)])
    columns = ["direction", "success", "strength", "perplexity", "distinct-1", "distinct-2", "loops", "tokens"]
    note = "◀ the strength at which targets are compared: the highest within the limit of perplexity"
    return Table(columns, rows, note=note, text_columns=2)


def _compared(trial: Trial) -> list[tuple[str, Cell | None]]:
    """No direction, then each at the strength at which they are compared; None where that is none."""
    return [("none", trial.cells[0]), *trial.chosen.items()]


def _confusion(trial: Trial) -> Table:
    rows = [
        [name, *(cell and share(cell.judged[k]) for k in trial.classes), cell and f"{cell.strength:g}"]
        for name, cell in _compared(trial)
    ]
    return Table(["steered to", *trial.classes, "strength"], rows)


def _side_by_side(trial: Trial) -> list[Table]:
    tables = []
    for number, prompt in enumerate(trial.prompts[:SHOWN]):
        at = number * trial.samples
        rows = [[name, c.verdicts[at], clip(c.texts[at])] for name, c in _compared(trial) if c is not None]
        tables.append(Table(["steered to", "judged as", "continuation"], rows, title=clip(prompt), text_columns=3))
    return tables


def _directions(directions: Directions) -> list[Table]:
    counts = directions.facts.get("counts", {})
    rows = [
        [name, str(counts.get(name, {}).get("selected_by", "")), counts.get(name, {}).get("selected"),
         counts.get(name, {}).get("total"), f"{float(vector.norm()):.3g}"]
        for name, vector in directions.vectors.items()
    ]  # fmt: skip
    tables = [Table(["direction", "kept by", "kept", "of", "length"], rows, text_columns=2)]
    losses = directions.facts.get("probe_loss_by_layer", {})
    if len(losses) > 1:
        how = "out of fold" if directions.facts.get("folds") else "in sample"
        layers = [[layer, f"{loss:.3f}"] for layer, loss in losses.items()]
        tables.append(Table(["layer", "probe loss"], layers, note=f"{how}, in nats; the lowest was taken"))
    return tables
