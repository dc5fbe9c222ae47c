"""Reading `metrics.csv`, the one place from which reports and tables take a run's numbers."""

from __future__ import annotations

import csv
import io
import math
from dataclasses import dataclass, field
from pathlib import Path

Points = list[tuple[int, float]]

LARGEST = 1e30  # beyond this a number says no more than infinity does, and plots cannot hold it
LARGEST_STEP = 10**15


@dataclass(frozen=True)
class MetricsLog:
    """The numbers of one run.

    Attributes:
        series: by metric name, `(step, value)` in order of steps, one value a step.
        broken: by metric name, the first step at which it was NaN or infinite.
    """

    series: dict[str, Points] = field(default_factory=dict)
    broken: dict[str, int] = field(default_factory=dict)

    def points(self, name: str) -> Points:
        """`(step, value)` of one metric; empty when it was never logged."""
        return self.series.get(name, [])

    def last(self, name: str) -> float | None:
        """The newest value of a metric; None when it was never logged."""
        points = self.series.get(name)
        return points[-1][1] if points else None

    def highest(self, name: str) -> float | None:
        """The highest value of a metric; None when it was never logged."""
        points = self.series.get(name)
        return max(value for _, value in points) if points else None

    @property
    def steps(self) -> int:
        """Optimizer steps taken when the last training figures were logged (their first step is number 0)."""
        trained = [points[-1][0] for name, points in self.series.items() if name.startswith(("train/", "perf/"))]
        return 1 + max(trained, default=-1)


def read_metrics(path: Path) -> MetricsLog:
    """Read a `metrics.csv` as Lightning's `CSVLogger` writes it.

    Rows may leave columns empty. When a step is written twice, as a run resumed from an older checkpoint
    does, the later row holds. What is not a number is passed over: a run that was killed leaves half a line.

    Args:
        path: the file; a missing one gives an empty log.
    """
    if not path.is_file():
        return MetricsLog()
    return parse_metrics(path.read_text(encoding="utf-8", errors="replace"))


def parse_metrics(text: str) -> MetricsLog:
    """The same from the file's text.

    Args:
        text: comma-separated values with a header; the column `step` gives the steps, or else the row number
            does.
    """
    values: dict[str, dict[int, float]] = {}
    broken: dict[str, int] = {}
    for number, row in enumerate(csv.DictReader(io.StringIO(text.replace("\0", ""), newline=""))):
        at = _number(row.get("step"))
        if at is None and "step" in row:
            continue
        step = number if at is None else at
        if not 0 <= step < LARGEST_STEP:
            continue
        for name, cell in row.items():
            value = _number(cell)
            if name in (None, "", "step", "epoch") or value is None:
                continue
            if abs(value) < LARGEST:
                values.setdefault(name, {})[int(step)] = value
            else:
                broken.setdefault(name, int(step))
    return MetricsLog({name: sorted(by_step.items()) for name, by_step in sorted(values.items())}, broken)


def _number(cell: object) -> float | None:
    """The cell as a number, NaN as infinity; None when it is none."""
    if not isinstance(cell, str):
        return None
    try:
        value = float(cell)
    except ValueError:
        return None
    return math.inf if math.isnan(value) else value
