"""Tables of the newest results, written into docs/peers.md and docs/measurements.md between their markers.

python -m benchmarks.report
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from benchmarks.record import RESULTS

PAGES = [Path(__file__).parents[1] / "docs" / name for name in ("peers.md", "measurements.md")]
MARKED = re.compile(r"(<!-- (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def newest(name: str, folder: Path = RESULTS) -> tuple[str, dict[str, Any]] | None:
    """File name and content of the newest result of that name, or None.

    Args:
        name: as given to `benchmarks.record.record`.
        folder: of the results.
    """
    found = sorted(folder.glob(f"20??-??-??-{name}.json"))
    return (found[-1].name, json.loads(found[-1].read_text())) if found else None


def sft_training(result: dict[str, Any]) -> list[str]:
    """C1: rates, speed-ups, memory and losses by case."""
    heads = (
        "case",
        "tokens through the model",
        "trained tokens/s",
        "per CPU second",
        "lit_reason is faster by (by batch)",
        "in CPU seconds",
        "peak memory",
        "lit_reason needs of it",
        "losses differ by",
    )
    rows = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for name, row in result["cases"].items():
        if "failed" in row:
            rows.append(f"| {name} | did not run: {row['failed']} |" + " |" * (len(heads) - 2))
            continue
        gap = row.get("largest_loss_difference")
        cells = (
            f"{name}: {row['what']}",
            f"{row['tokens']:,}",
            f"{row['trained_tokens_per_wall_s']:.1f}",
            f"{row['trained_tokens_per_cpu_s']:.1f}",
            f"{row['speedup_of_lit_reason_wall_s']:.2f} ({_range(row['speedup_by_batch_wall_s'])})",
            f"{row['speedup_of_lit_reason_cpu_s']:.2f} ({_range(row['speedup_by_batch_cpu_s'])})",
            f"{row['peak_mib']['median']:,.0f} MiB",
            f"{row['memory_of_lit_reason']:.2f}",
            "other batches" if gap is None else f"{gap:.0e}",
        )
        rows.append("| " + " | ".join(cells) + " |")
    ours = result["cases"]["lit_reason"]
    if "of_floor" in ours:
        rows += [
            "",
            f"Floor: lit_reason's steps take {ours['of_floor']:.2f} times what their matrix products alone would.",
        ]
    return rows


def against(base: str, keys: dict[str, str]) -> Any:
    """A table of cases, each figure with its ratio to the base.

    Args:
        base: case that the others are divided by.
        keys: figures and their headings.
    """

    def table(result: dict[str, Any]) -> list[str]:
        heads = [h for heading in keys.values() for h in (heading, f"of {base}")]
        rows = [f"| case | {' | '.join(heads)} |", "|---" * (1 + len(heads)) + "|"]
        for name, row in result["cases"].items():
            if "failed" in row:
                rows.append(f"| {name} | did not run: {row['failed']} |" + " |" * (len(heads) - 1))
                continue
            cells = []
            for key in keys:
                ratio = row[f"{key}_ratio"]
                cells += [_middle(row[key]), f"{ratio['median']:.2f} ({_range(ratio)})"]
            rows.append(f"| {name}: {row['what']} | {' | '.join(cells)} |")
        return rows

    return table


def loop_overhead(result: dict[str, Any]) -> list[str]:
    """C6: seconds a step of each loop, against both bare ones."""
    bare = [name for name in result["loops"] if name.startswith("bare")]
    heads = ["CPU seconds a step", *(f"of {name}" for name in bare)]
    rows = [f"| loop | {' | '.join(heads)} |", "|---" * (1 + len(heads)) + "|"]
    for name, row in result["loops"].items():
        ratios = [row[f"ratio to {other}"]["cpu_s"] for other in bare]
        cells = [_middle(row["cpu_s"]), *(f"{r['median']:.3f} ({_range(r)})" for r in ratios)]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return rows


def attribution(result: dict[str, Any]) -> list[str]:
    """Error and cost of each method of Shapley credit, and its cost at equal error."""
    budgets = next(iter(result["methods"].values()))["points"]
    calls = ", ".join(f"{p['calls']:,.0f}" for p in budgets)
    rows = [
        f"| method | error after about {calls} calls | CPU s | attributions a CPU second at error 0.05 "
        "| cost of ours at equal error, times (each response) |",
        "|---|---|---|---|---|",
    ]
    for name, row in result["methods"].items():
        errors, seconds = (", ".join(f"{p[key]:.2f}" for p in row["points"]) for key in ("error", "cpu"))
        ratios = row["efficiency_over_ours"]
        within = row["points"][-1]["error"] <= ERROR
        rate = f"{1 / row['cpu_at_error']:.2g}" + ("" if within else " (extrapolated)")
        times = f"{ratios[len(ratios) // 2]:.1f} ({ratios[0]:.1f} to {ratios[-1]:.1f})"
        rows.append(f"| {name} | {errors} | {seconds} | {rate} | {times} |")
    return rows


def attribution_savings(result: dict[str, Any]) -> list[str]:
    """What spans, memory and the shared prompt save."""
    whole = result["spans"][0]["calls"]
    rows = [
        "| tokens of a span | reward calls | saved | error of the tokens' credit | of the spans' credit |",
        "|---" * 5 + "|",
    ]
    for r in result["spans"]:
        cells = (f"{r['span']}", f"{r['calls']:.0f}", _saved(r["calls"], whole), f"{r['error']:.2f}")
        rows.append(f"| {' | '.join(cells)} | {r['span_error']:.2f} |")
    know, keep = result["coalitions"], result["answers"]
    alone = ", ".join(f"{name} {know[name]:.0f}" for name in know if name not in ("sum", "together"))
    rows += ["", "| reward calls | without memory | with memory | saved |", "|---" * 4 + "|"]
    rows.append(
        f"| of several explainers of one answer ({alone}) | {know['sum']:.0f} | {know['together']:.0f} "
        f"| {_saved(know['together'], know['sum'])} |"
    )
    total = {name: sum(values) for name, values in keep.items()}
    rows.append(
        f"| of a training run of {RUN_UPDATES} updates | {total['without']:,.0f} | {total['with']:,.0f} "
        f"| {_saved(total['with'], total['without'])} |"
    )
    quarters = zip(("first", "second", "third", "last"), keep["with"], keep["without"], strict=True)
    rows += [f"| its {name} quarter | {b:,.0f} | {a:,.0f} | {_saved(a, b)} |" for name, a, b in quarters]
    rows += [
        "",
        "| prompt, tokens | reward tokens, whole copies | shared prompt | saved | CPU seconds, whole over shared |",
    ]
    rows.append("|---" * 5 + "|")
    for r in result["shared_prompt"]:
        middle = r["times"][len(r["times"]) // 2]
        cells = (r["prompt"], f"{r['whole']:,}", f"{r['shared']:,}", _saved(r["shared"], r["whole"]))
        rows.append(f"| {' | '.join(map(str, cells))} | {middle:.1f} ({r['times'][0]:.1f} to {r['times'][-1]:.1f}) |")
    return rows


def planted_optimum(result: dict[str, Any]) -> list[str]:
    """Regrets of searches for a planted optimum, seed by seed."""
    rows = ["| | median regret | worst | all |", "|---" * 4 + "|"]
    for name, row in result["searches"].items():
        every = ", ".join(f"{r:.3f}" for r in row["regrets"])
        rows.append(f"| {name} | {row['median']:.3f} | {row['worst']:.3f} | {every} |")
    return rows


def _saved(now: float, before: float) -> str:
    return f"{1 - now / before:.0%}"


ERROR, RUN_UPDATES = 0.05, 16  # as in benchmarks.attribution and benchmarks.shaping_study, which import torch
COSTS = {"cpu_s": "CPU seconds", "wall_s": "seconds", "rise_mib": "rise of memory, MiB"}
ROLLOUT_COSTS = {
    "cpu_s_one_turn": "CPU seconds, one turn",
    "wall_s_one_turn": "seconds",
    "cpu_s_four_turns": "CPU seconds, 4 turns",
    "wall_s_four_turns": "seconds",
}
TABLES = {
    "sft_training": sft_training,
    "head_loss_peers": against("materialised", COSTS),
    "policy_update": against("trl", COSTS),
    "rollouts": against("lit_reason", ROLLOUT_COSTS),
    "grpo_steps": against("trl", {"cpu_s": "CPU seconds a step", "steps_an_hour": "steps an hour"}),
    "loop_overhead": loop_overhead,
    "attribution": attribution,
    "attribution_savings": attribution_savings,
    "planted_optimum": planted_optimum,
}


def _middle(figure: dict[str, float]) -> str:
    return f"{figure['median']:.3g}"


def _range(figure: dict[str, float]) -> str:
    return f"{figure['min']:.2f} to {figure['max']:.2f}"


def fill(page: str, folder: Path = RESULTS) -> str:
    """The page with its tables renewed.

    Args:
        page: with blocks `<!-- name -->` ... `<!-- end -->`.
        folder: of the results.
    """

    def block(match: re.Match[str]) -> str:
        found = newest(match[2], folder)
        if found is None:
            lines = ["Not recorded yet; `make bench` does it."]
        else:
            name, file = found
            facts, known = file["result"], {**file["versions"], **file["result"].get("peers", {})}
            shown = ("torch", "transformers", "lightning", "trl", "liger-kernel", "captum", "shap")
            told = ", ".join(f"{package} {known[package]}" for package in shown if package in known)
            cores, load = file["machine"]["cores"], file["machine"].get("load_15_minutes", 0.0)
            busy = f" (busy with other work too: load {load})" if load > 2 * cores else ""
            machine = f"{cores} cores, no GPU, threads: {facts.get('threads', 1)}{busy}"
            lines = [f"`{name}`, {machine}; {told}.", *file["notes"], "", *TABLES[match[2]](facts)]
        return match[1] + "\n".join(lines) + "\n" + match[3]

    return MARKED.sub(block, page)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(fill(page.read_text()))
