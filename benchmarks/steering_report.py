"""What the cells of `benchmarks.steering_study` come to: success with intervals, paired differences, a plot.

python -m benchmarks.steering_report --cells runs/steering/cells.jsonl --plot docs/studies/steering.svg
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from benchmarks.record import record
from lit_reason.metrics.intervals import bootstrap_ratio

CLASSES = ["food", "law", "science", "sports"]
NAMES = {
    "none": "unsteered",
    "confident": "confident",
    "same_count": "same count, at random",
    "mean_difference": "mean difference",
    "probe_weight": "probe weights",
    "mean": "class mean",
    "random": "random vector",
}
KEPT = ("seed", "target", "method", "strength", "perplexity", "generations", "judged", "distinct_2", "layer", "cpu_s")


def rates(cell: dict[str, Any], target: str) -> np.ndarray:
    """Success of each opening, as a share of its continuations."""
    counts = np.array(cell["by_prompt"], dtype=float)
    return counts[:, CLASSES.index(target)] / counts.sum(1)


def table(cells: Sequence[dict[str, Any]], target: str) -> list[dict[str, Any]]:
    """Success and perplexity of each method over its seeds, with bootstrap intervals over openings and seeds.

    Args:
        cells: all test cells.
        target: the wanted class.
    """
    rows = []
    for method in NAMES:
        mine = [c for c in cells if c["method"] == method and c["target"] in (target, None)]
        if mine:
            units = np.concatenate([rates(c, target) for c in mine])
            low, high = bootstrap_ratio(units.tolist(), [1.0] * len(units))
            rows.append(
                {
                    "method": method,
                    "seeds": [c["seed"] for c in mine],
                    "success": float(units.mean()),
                    "low": low,
                    "high": high,
                    "perplexity": float(np.exp(np.mean([np.log(c["perplexity"]) for c in mine]))),
                    "generations": sum(c["generations"] for c in mine),
                }
            )
    return rows


def differences(cells: Sequence[dict[str, Any]], target: str) -> list[dict[str, Any]]:
    """`confident` less each other method, opening by opening in the seeds that both have, with bootstrap intervals.

    Args:
        cells: all test cells.
        target: the wanted class.
    """
    at = {(c["method"], c["seed"]): rates(c, target) for c in cells if c["target"] in (target, None)}
    rows = []
    for method in NAMES:
        seeds = [s for s in range(10) if ("confident", s) in at and (method, s) in at]
        if method != "confident" and seeds:
            gaps = np.concatenate([at["confident", s] - at[method, s] for s in seeds])
            rng = np.random.default_rng(0)
            means = gaps[rng.integers(len(gaps), size=(4000, len(gaps)))].mean(1)
            low, high = np.quantile(means, [0.025, 0.975])
            gap = {"difference": float(gaps.mean()), "low": float(low), "high": float(high)}
            rows.append({"against": method, "seeds": seeds, **gap})
    return rows


def draw(tables: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Success against perplexity, one panel a target, with intervals.

    Args:
        tables: by target.
        path: an SVG file.
    """
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(tables), figsize=(4.8 * len(tables), 3.6), squeeze=False, sharey=True)
    for axes, (target, rows) in zip(panels[0], tables.items(), strict=True):
        for number, row in enumerate(rows):
            spread = [[row["success"] - row["low"]], [row["high"] - row["success"]]]
            colour = "grey" if row["method"] == "none" else f"C{list(NAMES).index(row['method']) - 1}"
            label = f"{NAMES[row['method']]} ({len(row['seeds'])} seed{'s' if len(row['seeds']) > 1 else ''})"
            axes.errorbar(
                row["perplexity"], row["success"], spread, fmt="os^Dvx*"[number], color=colour, capsize=3, label=label
            )
        axes.set(title=f"steered to {target}", xlabel="perplexity under the unsteered model", ylim=(0, 1))
        axes.axhline(1 / len(CLASSES), color="lightgrey", zorder=0)
        axes.legend(fontsize=8, frameon=False, loc="upper left")
    panels[0][0].set_ylabel("share judged as wanted")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Print the tables, record them, and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=Path, required=True, help="cells.jsonl of the study")
    parser.add_argument("--plot", type=Path, required=True, help="SVG file to draw")
    args = parser.parse_args()
    cells = [json.loads(line) for line in args.cells.read_text().splitlines()]
    tests = [c for c in cells if c["kind"] == "test"]
    targets = [t for t in ("food", "sports") if any(c["target"] == t for c in tests)]
    tables = {target: table(tests, target) for target in targets}
    result = {
        "success": tables,
        "confident less others": {target: differences(tests, target) for target in targets},
        "tests": [{k: c[k] for k in KEPT if k in c} for c in tests],
        "tuning": [{k: c[k] for k in KEPT if k in c} for c in cells if c["kind"] == "tune"],
        "sums": [{k: c[k] for k in KEPT if k in c} for c in cells if c["kind"] == "sum"],
        "judge accuracy by seed": {c["seed"]: c["judge_accuracy"] for c in tests},
        "directions": {f"{c['method']} {c['seed']}": c["facts"] for c in tests if "facts" in c},
    }
    notes = ["two cores shared with much other work, one thread at low priority; no GPU"]
    command = "python -m benchmarks.steering_study --model SmolLM2-135M-Instruct.Q4_1.gguf --out runs/steering --each 5"
    print(record("steering_study", result, notes, command))
    print(json.dumps({k: result[k] for k in ("success", "confident less others")}, indent=1))
    draw(tables, args.plot)


if __name__ == "__main__":
    main()
