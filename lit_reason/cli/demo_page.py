"""The page of `lit-reason demo`: both arms side by side."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from lit_reason.core.plots import COLOURS, Curve, Figure, line_plot
from lit_reason.core.report import (
    Interval,
    ReportData,
    Sample,
    Section,
    Tile,
    comparison_table,
    render_report,
    share,
)
from lit_reason.data.reading.row_files import complete_or_absent

if TYPE_CHECKING:
    from lit_reason.cli.demo import ArmResult

SHOWN = 2  # answers an arm
DISTURBED = "A token took much longer in one arm: the machine had other work. Compare tokens, not times."
SEGMENTS = {
    "understanding": "The first thoughts decode symbols: their values follow from the prompt.",
    "exploration": "Which symbols are tried next is chance, so this loss cannot reach 0.",
    "convergence": "The chain: values fetched from the first thoughts, and their sums.",
    "seam": "The first 16 tokens after the cut: how hard the jump is.",
}


def write_page(results: Sequence[ArmResult], path: Path, *, chance: float, rows: int, seed: int) -> Path:
    """Draw the comparison.

    Args:
        results: the arms; the others are compared with the first.
        path: the HTML file.
        chance: accuracy of the best constant guess.
        rows: problems trained on.
        seed: seed of the demo.

    Returns:
        The file.
    """
    first = results[0]
    tiles = [
        Tile(f"Accuracy, {r.name}", share(r.accuracy), f"{_span(r)} (95 %), best guess {share(chance)}", _interval(r))
        for r in results
    ]
    tiles += [Tile(f"Time saved by {r.name}", share(r.time_saved(first)), f"against {first.name}") for r in results[1:]]
    page = ReportData(
        "Full and condensed reasoning traces",
        kicker=("decode-and-chain problems", f"{rows:,} to train on", f"seed {seed}", "same steps in both arms"),
        verdict=_verdict(results, chance),
        tiles=tiles,
        sections=[
            Section("Arms", tables=[comparison_table([_row(r, first) for r in results])]),
            Section("Answers to held-out problems", figures=_drawn(_accuracy(results), _accuracy_by_time(results))),
            Section(
                "Loss by part of the trace",
                "Measured on each arm's own training traces. Understanding and convergence are the two edges of the "
                "full trace that EPiC keeps, in both arms; tokens just behind a cut count as seam instead.",
                figures=_drawn(*(_segment(results, name, note) for name, note in SEGMENTS.items())),
            ),
            Section("What the students write", samples=[s for r in results for s in _samples(r)]),
        ],
        footer="Each arm has a page of its own: " + ", ".join(f"{r.name}/report.html" for r in results),
    )
    with complete_or_absent(path) as unfinished:
        unfinished.write_text(render_report(page), encoding="utf-8")
    return path


def disturbed(results: Sequence[ArmResult]) -> bool:
    """Whether a trained token took one arm over 1.3 times as long as another, which the method cannot explain.

    Args:
        results: the arms.
    """
    paces = [result.seconds / max(result.trained_tokens, 1) for result in results]
    return max(paces) > 1.3 * min(paces)


def _span(result: ArmResult) -> str:
    return _interval(result).span


def _interval(result: ArmResult) -> Interval:
    return Interval(result.accuracy, result.low, result.high)


def _verdict(results: Sequence[ArmResult], chance: float) -> str:
    told = [f"{r.name} solves {share(r.accuracy)} ({_span(r)})" for r in results]
    saved = [
        f"{r.name} trained on {share(r.trained_tokens / results[0].trained_tokens)} of the tokens of {results[0].name} "
        f"in {share(r.seconds / results[0].seconds)} of the time"
        for r in results[1:]
    ]
    return (
        f"Of the held-out problems {', '.join(told)}; the best constant guess {share(chance)}. {'; '.join(saved)}. "
        "Nothing after the middle of these traces uses it, by construction: this is the case that suits condensation."
        + (f" {DISTURBED}" if disturbed(results) else "")
    )


def _row(result: ArmResult, first: ArmResult) -> dict[str, object]:
    generated = [record.tokens for record in result.records]
    return {
        "name": result.name,
        "accuracy": result.accuracy,
        "accuracy_low": result.low,
        "accuracy_high": result.high,
        "trained_tokens": result.trained_tokens,
        "seconds": result.seconds,
        "time_saved": None if result is first else result.time_saved(first),
        "generated_tokens": round(sum(generated) / len(generated), 1),
    }


def _drawn(*figures: Figure | None) -> list[Figure]:
    return [figure for figure in figures if figure is not None]


def accuracy_over_time(result: ArmResult, colour: str = COLOURS[0]) -> Curve:
    """Held-out accuracy of an arm against its seconds of training, with the interval as a band.

    Args:
        result: the arm.
        colour: of the curve.
    """
    totals = result.log.points("perf/total_seconds")

    def seconds(step: int) -> float:
        return max((total for at, total in totals if at <= step), default=0.0)

    by_step = _accuracy_by_step(result, colour)
    return Curve(
        result.name,
        [(seconds(int(step)), value) for step, value in by_step.points],
        colour,
        markers=True,
        band=[(seconds(int(step)), low, high) for step, low, high in by_step.band],
    )


def _accuracy_by_step(result: ArmResult, colour: str) -> Curve:
    low, high = (dict(result.log.points(f"val/pass@1_{end}")) for end in ("low", "high"))
    band = [(step, low[step], high[step]) for step in low if step in high]
    return Curve(result.name, result.log.points("val/pass@1"), colour, markers=True, band=band)


def _accuracy(results: Sequence[ArmResult]) -> Figure | None:
    curves = [_accuracy_by_step(r, colour) for r, colour in zip(results, COLOURS, strict=False)]
    return line_plot("Accuracy by step", curves, percent=True, note="Checked by generation; shaded: 95 % interval.")


def _accuracy_by_time(results: Sequence[ArmResult]) -> Figure | None:
    curves = [accuracy_over_time(r, colour) for r, colour in zip(results, COLOURS, strict=False)]
    return line_plot("Accuracy by time", curves, percent=True, x_label="seconds of training")


def _segment(results: Sequence[ArmResult], name: str, note: str) -> Figure | None:
    metric = f"train/loss_{name}"
    curves = [Curve(r.name, r.log.points(metric), c, smooth=True) for r, c in zip(results, COLOURS, strict=False)]
    return line_plot(name.capitalize(), curves, unit="nats a token", note=note, from_zero=True)


def _samples(result: ArmResult) -> list[Sample]:
    """Some answers, wrong ones first."""
    chosen = islice(sorted(result.records, key=lambda record: record.correct), SHOWN)
    return [
        Sample(r.prompt, r.completion, r.correct, f"{result.name}, {r.row_id}", f"expected {r.answer}") for r in chosen
    ]
