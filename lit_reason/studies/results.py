"""What runs of a study came to, and the arithmetic of its table."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from lit_reason.core.metrics_log import MetricsLog
from lit_reason.data.reading.row_files import complete_or_absent
from lit_reason.studies.plan import Cell, Study

LAST_OF_TRAINING = 5  # a training metric is noisy: this many of its last values are averaged
COSTS = {
    "trained_tokens": "perf/total_trained_tokens",
    "tokens": "perf/total_tokens",
    "seconds": "perf/total_seconds",
    "cpu_seconds": "perf/total_cpu_seconds",
}


@dataclass(frozen=True)
class CellResult:
    """What one cell came to.

    Attributes:
        task: its task.
        budget: its budget.
        arm: its arm.
        seed: its seed.
        key: digest of all settings; a result holds as long as they stay.
        figures: final value of every metric, of the last stage.
        steps: optimizer steps of all stages.
        trained_tokens: tokens that carried loss, over all stages; None when the recipe has no `Throughput`.
        tokens: tokens that went through the model.
        seconds: time in training steps.
        cpu_seconds: work in that time.
        curve: `(optimizer step, score)` of the last stage.
    """

    task: str
    budget: str
    arm: str
    seed: int
    key: str
    figures: Mapping[str, float]
    steps: int
    trained_tokens: float | None = None
    tokens: float | None = None
    seconds: float | None = None
    cpu_seconds: float | None = None
    curve: Sequence[tuple[int, float]] = ()

    @property
    def cell(self) -> Cell:
        """Its place in the study."""
        return Cell(self.task, self.budget, self.arm, self.seed)

    def write(self, path: Path) -> None:
        """Write it as JSON, whole or not at all."""
        with complete_or_absent(path) as unfinished:
            unfinished.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")


def read_result(path: Path, key: str) -> CellResult | None:
    """A finished cell.

    Args:
        path: its `result.json`.
        key: digest of the settings asked for now.

    Returns:
        None when it is not finished, or was made with other settings.
    """
    if not path.is_file():
        return None
    values = json.loads(path.read_text(encoding="utf-8"))
    return CellResult(**values) if values["key"] == key else None


def gather(cell: Cell, key: str, logs: Sequence[MetricsLog], score: str) -> CellResult:
    """A cell's result from the metrics of its stages.

    Args:
        cell: the cell.
        key: digest of its settings.
        logs: one a stage, in order.
        score: metric whose curve is kept.
    """
    costs: dict[str, float | None] = {}
    for name, metric in COSTS.items():
        values = [log.last(metric) for log in logs]
        costs[name] = None if None in values else sum(value or 0.0 for value in values)
    figures = {name: final(logs[-1], name) for name in logs[-1].series}
    curve = tuple(logs[-1].points(score))
    steps = sum(log.steps for log in logs)
    return CellResult(cell.task, cell.budget, cell.arm, cell.seed, key, figures, steps, curve=curve, **costs)


def final(log: MetricsLog, metric: str) -> float:
    """The value a run ended with: of a training metric the mean of the last five logged, of others the last.

    Args:
        log: the run's metrics.
        metric: one of them.
    """
    few = log.points(metric)[-LAST_OF_TRAINING if metric.startswith("train/") else -1 :]
    return fmean(value for _, value in few)


@dataclass(frozen=True)
class Row:
    """One row of the table: an arm on a task under a budget, over its seeds.

    Attributes:
        task: the task.
        budget: the budget.
        arm: the arm.
        scores: score by seed.
        intervals: ends of each seed's interval, by seed; empty when the score has none.
        gaps: score less the reference's with the same seed, by seed; empty for the reference.
        costs: mean trained tokens, tokens, seconds and CPU seconds; what was not measured is absent.
        ratios: mean over seeds of each cost relative to the reference's with the same seed.
        columns: mean of each further column; absent where no run has it.
    """

    task: str
    budget: str
    arm: str
    scores: Mapping[int, float]
    intervals: Mapping[int, tuple[float, float]] = field(default_factory=dict)
    gaps: Mapping[int, float] = field(default_factory=dict)
    costs: Mapping[str, float] = field(default_factory=dict)
    ratios: Mapping[str, float] = field(default_factory=dict)
    columns: Mapping[str, float] = field(default_factory=dict)

    @property
    def score(self) -> float:
        """Mean score over seeds."""
        return fmean(self.scores.values())

    @property
    def spread(self) -> tuple[float, float]:
        """Least and largest score of a seed."""
        return min(self.scores.values()), max(self.scores.values())

    @property
    def envelope(self) -> tuple[float, float] | None:
        """From the lowest to the highest end of the seeds' intervals: covers both the choice of problems and the
        seeds that were run. None without intervals."""
        if not self.intervals:
            return None
        lows, highs = zip(*self.intervals.values(), strict=True)
        return min(lows), max(highs)

    @property
    def gap(self) -> float | None:
        """Mean difference to the reference; None for the reference itself."""
        return fmean(self.gaps.values()) if self.gaps else None


def rows(study: Study, results: Iterable[CellResult]) -> list[Row]:
    """The table of a study, in its own order; places without a finished run are left out.

    Args:
        study: the study.
        results: finished cells.
    """
    found = {result.cell: result for result in results}
    if "tokens" in study.budgets:  # the reference's budget is its own run
        for cell, result in list(found.items()):
            if cell.arm == study.reference and cell.budget == "epochs":
                found[replace(cell, budget="tokens")] = result
    table = []
    for task in study.tasks:
        for budget in sorted(study.budgets):
            for arm in study.arms:
                by_seed = {s: r for s in study.seeds if (r := found.get(Cell(task, budget, arm, s))) is not None}
                reference = {s: found.get(Cell(task, budget, study.reference, s)) for s in by_seed}
                by_seed = {s: r for s, r in by_seed.items() if study.score in r.figures}
                if by_seed:
                    table.append(_row(study, Cell(task, budget, arm, 0), by_seed, reference))
    return table


def _row(study: Study, at: Cell, by_seed: Mapping[int, CellResult], reference: Mapping[int, CellResult | None]) -> Row:
    ends = [f"{study.score}_low", f"{study.score}_high"]
    pairs = {s: (r, base) for s, r in by_seed.items() if (base := reference[s]) is not None}
    is_reference = at.arm == study.reference
    return Row(
        at.task,
        at.budget,
        at.arm,
        scores={s: r.figures[study.score] for s, r in by_seed.items()},
        intervals={
            s: (r.figures[ends[0]], r.figures[ends[1]]) for s, r in by_seed.items() if set(ends) <= r.figures.keys()
        },
        gaps={}
        if is_reference
        else {s: r.figures[study.score] - base.figures[study.score] for s, (r, base) in pairs.items()},
        costs=_means({name: [getattr(r, name) for r in by_seed.values()] for name in COSTS}),
        ratios=_means(
            {name: [_ratio(getattr(r, name), getattr(b, name)) for r, b in pairs.values()] for name in COSTS}
        ),
        columns=_means({name: [r.figures.get(m) for r in by_seed.values()] for name, m in study.columns.items()}),
    )


def _ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a is not None and b else None


def _means(values: Mapping[str, Sequence[Any]]) -> dict[str, float]:
    present = {name: [v for v in several if v is not None] for name, several in values.items()}
    return {name: fmean(several) for name, several in present.items() if several}
