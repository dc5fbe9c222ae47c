"""Record a training run from its folder: what it cost, and accuracy before and after.

python -m benchmarks.run_record RUN_FOLDER NAME --command "lit-reason fit ..." [--note TEXT]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.record import record
from lit_reason.core.metrics_log import read_metrics

TOTALS = ("perf/total_seconds", "perf/total_tokens", "perf/total_trained_tokens")


def summary(folder: Path) -> dict:
    """Loss at both ends, totals, and every verified evaluation of a run.

    Args:
        folder: holds `metrics.csv`.
    """
    log = read_metrics(folder / "metrics.csv")
    loss = log.points("train/loss")
    ends = {"first_5": [v for _, v in loss[:5]], "last_5": [v for _, v in loss[-5:]]}
    names = ("val/pass@1", "val/pass@1_low", "val/pass@1_high", "val/ended", "val/generated_tokens", "val/repetition")
    by_step: dict[int, dict[str, float]] = {}
    for name in names:
        for step, value in log.points(name):
            by_step.setdefault(step, {})[name] = value
    return {
        "loss_mean": {name: sum(values) / len(values) for name, values in ends.items()},
        "loss_by_step": loss,
        "totals": {name: log.last(name) for name in TOTALS},
        "peak_memory_gb": log.highest("perf/peak_memory_gb"),
        "median_mfu": sorted(v for _, v in log.points("perf/mfu"))[len(log.points("perf/mfu")) // 2],
        "verified": by_step,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("name")
    parser.add_argument("--command", required=True)
    parser.add_argument("--note", action="append", default=[])
    options = parser.parse_args()
    print(record(options.name, summary(options.folder), options.note, options.command))
