"""What the cells of `benchmarks.steering_study` come to: success with intervals, paired differences, sums, a plot.

python -m benchmarks.steering_report --cells runs/steering/cells.jsonl --plot docs/studies/steering.svg
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np

from benchmarks.record import record
from benchmarks.steering_study import METHODS, TASK_OF, Cell, key
from benchmarks.steering_tasks import STYLES, TOPICS
from lit_reason.steering.judge import distinct

NAMES = {
    "none": "unsteered",
    "confident": "`confident`",
    "same_count": "`same_count`, drawn at random",
    "mean_difference": "`mean_difference`",
    "probe_weight": "`probe_weight`",
    "mean": "`mean`, as it is",
    "caa": "`caa`",
    "act_add": "`act_add`",
    "random": "`random`",
}
DRAWS = 4000
KEPT = ("kind", "seed", "target", "method", "prompts", "strengths", "each", "judge_accuracy", "layers", "cpu_s")
WEAK = 0.2  # nats: a direction that raises the perplexity less than this is not compared at equal perplexity


class Units(NamedTuple):
    """Prompts in seeds: what is drawn again for intervals.

    Attributes:
        success_U: share of a prompt's continuations that are as wanted.
        nll_U: their summed negative log-likelihood under the model without directions, in nats.
        tokens_U: their tokens.
    """

    success_U: np.ndarray
    nll_U: np.ndarray
    tokens_U: np.ndarray

    def worse(self, at: Any = slice(None)) -> float:
        """Logarithm of the perplexity."""
        return float(self.nll_U[at].sum() / self.tokens_U[at].sum())


def success(cell: Cell, target: str) -> np.ndarray:
    """Success by prompt: judged to be of the topic, or ended by itself within the limit of tokens."""
    if target in STYLES:
        return np.array(cell["ended"]) / cell["each"]
    counts = np.array(cell["by_prompt"]["topics"], dtype=float)
    return counts[:, TOPICS.index(target)] / counts.sum(1)


def units(cells: Iterable[Cell], target: str) -> Units:
    """All prompts of some cells."""
    parts = [(success(c, target), np.array(c["nll"]), np.array(c["tokens"], dtype=float)) for c in cells]
    return Units(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def interval(figure: Callable[[Any], float], count: int) -> dict[str, float]:
    """A figure with its 95 % bootstrap interval.

    Args:
        figure: takes numbers of units, with repeats.
        count: of units.
    """
    rng = np.random.default_rng(0)
    low, high = np.quantile([figure(rng.integers(count, size=count)) for _ in range(DRAWS)], [0.025, 0.975])
    return {"value": figure(np.arange(count)), "low": float(low), "high": float(high)}


class Comparison:
    """The test cells towards one target.

    Args:
        cells: all cells.
        target: the wanted class.
    """

    def __init__(self, cells: Sequence[Cell], target: str) -> None:
        self.target = target
        chosen = [c for c in cells if c["kind"] == "test" and c["prompts"] == TASK_OF[target]]
        self.at = {(c["method"], c["seed"]): c for c in chosen if c["target"] in (target, None)}

    def seeds(self, *methods: str) -> list[int]:
        """Seeds that all of these methods have."""
        return [s for s in range(10) if all((method, s) in self.at for method in methods)]

    def units(self, method: str, seeds: Sequence[int]) -> Units:
        """A method's prompts in some seeds."""
        return units((self.at[method, seed] for seed in seeds), self.target)

    def table(self) -> list[dict[str, Any]]:
        """Success and perplexity of each method over its seeds."""
        rows = []
        for method in NAMES:
            seeds = self.seeds(method)
            if not seeds:
                continue
            mine, cells = self.units(method, seeds), [self.at[method, s] for s in seeds]
            most = min(len(c["texts"]) for c in self.at.values())
            row = {
                "method": method,
                "seeds": seeds,
                "texts": sum(len(c["texts"]) for c in cells),
                "strength": cells[0]["strengths"].get(self.target, 0.0),
                "success": interval(lambda at, mine=mine: float(mine.success_U[at].mean()), len(mine.success_U)),
                "perplexity": float(np.exp(mine.worse())),
                "distinct_2": float(np.mean([distinct(c["texts"][:most], 2) for c in cells])),
                "tokens": float(mine.tokens_U.sum() / sum(len(c["texts"]) for c in cells)),
            }
            if self.target in STYLES:
                counts = np.sum([np.sum(c["by_prompt"]["style"], axis=0) for c in cells], axis=0)
                row["judged"] = float(counts[list(STYLES).index(self.target)] / counts.sum())
            rows.append(row)
        return rows

    def differences(self) -> list[dict[str, Any]]:
        """`confident` less each other method, prompt by prompt in the seeds that both have.

        At equal perplexity: each method's success is read off the straight line from the unsteered continuations to its
        own, over the logarithm of the perplexity, at the lower of the two perplexities.
        """
        rows = []
        for method in NAMES:
            seeds = self.seeds("confident", method)
            if method == "confident" or not seeds:
                continue
            ours, theirs = self.units("confident", seeds), self.units(method, seeds)
            gaps = ours.success_U - theirs.success_U
            row = {"against": method, "seeds": seeds}
            row["as run"] = interval(lambda at, gaps=gaps: float(gaps[at].mean()), len(gaps))
            plain = self.seeds("none", "confident", method)
            if method != "none" and plain == seeds:
                bare = self.units("none", seeds)
                if min(ours.worse(), theirs.worse()) > bare.worse() + WEAK:
                    row["at equal perplexity"] = interval(
                        lambda at, three=(bare, ours, theirs): levelled(*three, at), len(gaps)
                    )
            rows.append(row)
        return rows


def levelled(bare: Units, ours: Units, theirs: Units, at: Any) -> float:
    """Difference of success at the lower of two perplexities.

    Args:
        bare: unsteered.
        ours: one method, with the same units.
        theirs: another.
        at: numbers of units.
    """
    start, level = bare.success_U[at].mean(), min(ours.worse(at), theirs.worse(at)) - bare.worse(at)
    gains = [(m.success_U[at].mean() - start) * level / (m.worse(at) - bare.worse(at)) for m in (ours, theirs)]
    return float(gains[0] - gains[1])


def pooled(tests: Sequence[Comparison], method: str) -> dict[str, Any]:
    """What `confident` gains on a method, as the mean of several targets.

    The targets share openings and seeds, so an interval draws these again for all of them together.

    Args:
        tests: a target each.
        method: the other one.
    """
    seeds = sorted(set.intersection(*(set(t.seeds("none", "confident", method)) for t in tests)))
    three = [tuple(t.units(m, seeds) for m in ("none", "confident", method)) for t in tests]
    count = len(three[0][0].success_U)
    gaps = np.mean([ours.success_U - theirs.success_U for _, ours, theirs in three], axis=0)
    return {
        "against": method,
        "targets": [t.target for t in tests],
        "seeds": seeds,
        "as run": interval(lambda at: float(gaps[at].mean()), count),
        "at equal perplexity": interval(lambda at: float(np.mean([levelled(*units, at) for units in three])), count),
    }


def sums(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """Two directions together and each alone: success towards both, perplexity."""
    rows = []
    summed = {(c["target"], c["prompts"], c["method"]): c for c in cells if c["kind"] == "sum" and "+" in c["target"]}
    for target, prompts, method in summed:
        both = target.split("+")
        bare = {c["seed"]: c for c in cells if (c["kind"], c["method"], c["prompts"]) == ("test", "none", prompts)}
        for added in ("", *both, target):
            there = [
                c
                for c in cells
                if (c["kind"], c["target"], c["prompts"], c["method"]) == ("sum", added, prompts, method)
            ]
            seeds = [c["seed"] for c in cells if (c["kind"], c["target"], c["prompts"]) == ("sum", target, prompts)]
            if not added:
                there = [bare[s] for s in seeds if s in bare]
            if not there:
                continue  # still to be run
            row = {
                "added": added or "nothing",
                "prompts": prompts,
                "method": method,
                "seeds": [c["seed"] for c in there],
            }
            row["texts"], row["perplexity"] = sum(len(c["texts"]) for c in there), np.exp(units(there, both[0]).worse())
            for name in both:
                mine = units(there, name).success_U
                row[name] = interval(lambda at, mine=mine: float(mine[at].mean()), len(mine))
            rows.append(row)
    return rows


def confusion(cells: Sequence[Cell], method: str) -> dict[str, list[float]]:
    """Shares of the topics that the judge sees in the continuations steered to each topic, and in unsteered ones.

    Args:
        cells: all cells.
        method: how the directions were found.
    """
    shares = {}
    for target in (None, *TOPICS):
        wanted = ("test", "topics", method if target else "none", target)
        found = [c for c in cells if (c["kind"], c["prompts"], c["method"], c["target"]) == wanted]
        if found:
            counts = np.sum([np.sum(c["by_prompt"]["topics"], axis=0) for c in found], axis=0)
            shares[target or "nothing"] = (counts / counts.sum()).tolist()
    return shares


def draw(tables: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Success against perplexity, one panel a target, with intervals.

    Args:
        tables: by target.
        path: an SVG file.
    """
    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows_of_panels = -(-len(tables) // 3)
    figure, grid = pyplot.subplots(rows_of_panels, 3, figsize=(11.7, 3.7 * rows_of_panels + 0.4), squeeze=False)
    panels = grid.ravel()[: len(tables)]
    for spare in grid.ravel()[len(tables) :]:
        spare.axis("off")
    methods = [m for m in NAMES if any(row["method"] == m for rows in tables.values() for row in rows)]
    for axes, (target, rows) in zip(panels, tables.items(), strict=True):
        for row in rows:
            number, value = methods.index(row["method"]), row["success"]
            spread = [[value["value"] - value["low"]], [value["high"] - value["value"]]]
            colour = "black" if row["method"] == "none" else f"C{number - 1}"
            label = NAMES[row["method"]].replace("`", "")
            marker = "os^DvP*Xd"[number]
            axes.errorbar(row["perplexity"], value["value"], spread, fmt=marker, color=colour, capsize=3, label=label)
        wanted = "share that ended within the limit" if target in STYLES else "share judged as wanted"
        axes.set(title=f"steered to {target}", xlabel="perplexity under the unsteered model", ylabel=wanted)
        axes.set_ylim(0, max(0.6, *(row["success"]["high"] + 0.05 for row in rows)))
        if target not in STYLES:
            axes.axhline(1 / len(TOPICS), color="lightgrey", zorder=0)
    most = max(panels, key=lambda axes: len(axes.get_legend_handles_labels()[1]))
    figure.legend(
        *most.get_legend_handles_labels(), fontsize=9, frameon=False, loc="lower right", bbox_to_anchor=(0.97, 0.12)
    )
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def span(figure: dict[str, float], sign: str = "") -> str:
    """A share in percent, with its interval."""
    return f"{100 * figure['value']:{sign}.0f} ({100 * figure['low']:{sign}.0f} to {100 * figure['high']:{sign}.0f})"


def markdown(result: dict[str, Any]) -> str:
    """The tables of the page."""
    lines = []
    for target, rows in result["success"].items():
        extra = target in STYLES
        lines += ["", f"| towards {target} | seeds | texts | strength | success, % (95 %) | perplexity | distinct-2 |"
                  + (" judged concise | tokens |" if extra else "")]  # fmt: skip
        lines += ["|---|---|---|---|---|---|---|" + ("---|---|" if extra else "")]
        for row in rows:
            cells = [NAMES[row["method"]], listing(row["seeds"]), row["texts"], f"{row['strength']:.2f}",
                     span(row["success"]), f"{row['perplexity']:.1f}", f"{row['distinct_2']:.2f}"]  # fmt: skip
            cells += [f"{row['judged']:.0%}", f"{row['tokens']:.0f}"] if extra else []
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    for target, rows in result["confident less others"].items():
        lines += ["", f"| `confident` towards {target}, less | seeds | points as run | points at equal perplexity |"]
        lines += ["|---|---|---|---|"]
        for row in rows:
            level = row.get("at equal perplexity")
            cells = [NAMES[row["against"]], listing(row["seeds"]), span(row["as run"], "+")]
            lines.append("| " + " | ".join([*cells, span(level, "+") if level else ""]) + " |")
    lines += ["", "| `confident`, mean of the topics, less | seeds | points as run | points at equal perplexity |"]
    lines += ["|---|---|---|---|"]
    for row in result["pooled"]:
        gains = [span(row[name], "+") for name in ("as run", "at equal perplexity")]
        lines.append("| " + " | ".join([NAMES[row["against"]], listing(row["seeds"]), *gains]) + " |")
    shares = result["confusion"]
    lines += [
        "",
        "| steered to | " + " | ".join(f"{name}, %" for name in TOPICS) + " |",
        "|---|" + "---|" * len(TOPICS),
    ]
    lines += [f"| {name} | " + " | ".join(f"{100 * v:.0f}" for v in row) + " |" for name, row in shares.items()]
    for row in result["sums"]:
        both = [name for name in row if isinstance(row[name], dict)]
        if row["added"] == "nothing":
            lines += [
                "",
                f"| added | seeds | texts | {both[0]}, % | {both[1]}, % | perplexity |",
                "|---|---|---|---|---|---|",
            ]
        cells = [row["added"], listing(row["seeds"]), row["texts"], *(span(row[name]) for name in both)]
        lines.append("| " + " | ".join(map(str, [*cells, f"{row['perplexity']:.1f}"])) + " |")
    return "\n".join(lines)


def listing(numbers: Sequence[int]) -> str:
    """Numbers with commas between."""
    return ", ".join(map(str, numbers))


def main() -> None:
    """Print the tables, record them, and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=Path, required=True, help="cells.jsonl of the study")
    parser.add_argument("--plot", type=Path, required=True, help="SVG file to draw")
    args = parser.parse_args()
    cells = list({key(c): c for c in map(json.loads, args.cells.read_text().splitlines())}.values())
    tests = {target: Comparison(cells, target) for target in TASK_OF}
    tests = {target: there for target, there in tests.items() if there.seeds("confident")}
    topical = [there for target, there in tests.items() if target in TOPICS and there.seeds(*METHODS)]
    result = {
        "success": {target: there.table() for target, there in tests.items()},
        "confident less others": {target: there.differences() for target, there in tests.items()},
        "pooled": [pooled(topical, method) for method in METHODS[1:]],
        "confusion": confusion(cells, "confident"),
        "sums": sums(cells),
        "tests": [
            {k: c[k] for k in KEPT if k in c}
            | {name: float(success(c, name).mean()) for name in TASK_OF if TASK_OF[name] in ("topics", c["prompts"])}
            | {"perplexity": float(np.exp(units([c], "food").worse()))}
            for c in cells
            if c["kind"] != "tune"
        ],
        "tuning": [{k: c[k] for k in (*KEPT, "perplexity") if k in c} for c in cells if c["kind"] == "tune"],
        "directions": {
            f"{c['method']} {name} {c['seed']}": facts for c in cells for name, facts in c.get("facts", {}).items()
        },
    }
    notes = ["two cores shared with much other work, one thread at low priority; no GPU"]
    command = "python -m benchmarks.steering_study --model SmolLM2-135M-Instruct.Q4_1.gguf --out runs/steering"
    print(record("steering_study", result, notes, command))
    print(markdown(result))
    draw(result["success"], args.plot)


if __name__ == "__main__":
    main()
