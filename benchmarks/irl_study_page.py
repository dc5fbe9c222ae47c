"""Table and plot of docs/studies/irl.md, from the runs of `benchmarks.irl_study`.

python -m benchmarks.irl_study_page docs/studies/results/irl.json docs/studies/irl.svg
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.irl_study import ARMS

NAMES = {
    "start": "start",
    "sft": "SFT",
    "spin": "SPIN",
    "irft-linear": "IRFT, linear",
    "dpo-same-pairs": "DPO, same pairs",
    "irl-bt": "IRL (BT) + RLOO",
    "irl-linear": "IRL (linear) + RLOO",
    "dpo-true": "DPO, true preferences",
}
FIGURES = {"kl": "KL to the expert", "true_reward": "true reward", "held_out_accuracy": "held-out accuracy"}
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # two-sided 95 % quantile, by number of seeds
COLOURS = dict(zip(ARMS, ("#777777", "#9bbf85", "#c8694f", "#e0a458", "#4f7fb8", "#8a6fb0", "#4f8f5b"), strict=True))


def interval(values: list[float]) -> tuple[float, float]:
    """Mean, and half of its 95 % interval (Student); 0 for a single value.

    Args:
        values: one a seed.
    """
    mean, n = sum(values) / len(values), len(values)
    if n < 2:
        return mean, 0.0
    deviation = (sum((v - mean) ** 2 for v in values) / (n - 1)) ** 0.5
    return mean, STUDENT[n] * deviation / n**0.5


def by_arm(runs: list[dict[str, Any]], noise: float) -> dict[str, list[dict[str, Any]]]:
    """Runs of one noise by arm, of those seeds alone on which every arm was run.

    Args:
        runs: all of them.
        noise: share of spoilt demonstrations.
    """
    found = defaultdict(list)
    for run in runs:
        if run["noise"] == noise:
            found[run["arm"]].append(run)
    complete = set.intersection(*({r["seed"] for r in found[arm]} for arm in ARMS))
    return {arm: [r for r in found[arm] if r["seed"] in complete] for arm in ARMS if complete}


def table(arms: dict[str, list[dict[str, Any]]]) -> str:
    """Markdown.

    Args:
        arms: runs by arm.
    """
    lines = ["| arm | " + " | ".join(FIGURES.values()) + " |", "|---|" + "---|" * len(FIGURES)]
    rows = {"start": [[r["start"] for r in arms["sft"]]]} | {
        a: [[r["rounds"][-1] for r in rs]] for a, rs in arms.items()
    }
    for arm, (last,) in rows.items():
        cells = []
        for name in FIGURES:
            values = [figures[name] for figures in last if name in figures]
            mean, half = interval(values) if values else (0.0, 0.0)
            cells.append(f"{mean:.3f} ± {half:.3f}" if len(values) > 1 else f"{mean:.3f}" if values else "-")
        lines.append(f"| {NAMES[arm]} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(runs: list[dict[str, Any]], path: Path) -> None:
    """True reward and held-out accuracy by round, for clean and for noisy demonstrations.

    Args:
        runs: all of them.
        path: of the SVG.
    """
    noises = [noise for noise in sorted({r["noise"] for r in runs}) if by_arm(runs, noise)]
    figure = Figure(figsize=(9, 3.4 * len(noises)), layout="constrained")
    grid = figure.subplots(len(noises), 2, squeeze=False)
    for row, noise in zip(grid, noises, strict=True):
        for number, (arm, of_arm) in enumerate(by_arm(runs, noise).items()):
            series = [[r["start"], *r["rounds"]] for r in of_arm]
            for panel, name in zip(row, ("true_reward", "held_out_accuracy"), strict=True):
                at = [k for k in range(len(series[0])) if all(name in s[k] for s in series)]
                if not at:
                    continue
                means, halves = zip(*(interval([s[k][name] for s in series]) for k in at), strict=True)
                ends = at if len(series[0]) == 4 else [3 if k else 0 for k in at]  # one stretch ends where rounds do
                x = [k + 0.05 * (number - 3) for k in ends]
                panel.errorbar(
                    x, means, halves, color=COLOURS[arm], marker="o", markersize=4, capsize=2, label=NAMES[arm]
                )
        for panel, label in zip(row, ("true reward of the policy", "held-out accuracy of the reward"), strict=True):
            panel.set_xlabel("round")
            panel.set_ylabel(label)
            panel.set_xticks(range(4))
            panel.grid(alpha=0.3)
            panel.set_title(
                f"{noise:.0%} of the demonstrations replaced" if noise else "clean demonstrations", fontsize=10
            )
    figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=9)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def main(results: Path, picture: Path) -> None:
    """Print the tables and draw the plot.

    Args:
        results: what the study wrote.
        picture: where to draw.
    """
    runs = json.loads(results.read_text())["runs"]
    for noise in sorted({r["noise"] for r in runs}):
        arms = by_arm(runs, noise)
        if arms:
            print(f"noise {noise:g}, {len(arms['sft'])} seeds\n\n{table(arms)}\n")
    plot(runs, picture)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
