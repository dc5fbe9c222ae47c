"""Tool calls and right answers of SmolLM2-135M-Instruct: untouched, after a warm start, after turn-level GRPO.

    python -m benchmarks.turn_level_smollm2 --model SmolLM2-135M-Instruct.Q4_1.gguf --out runs/smollm2-tool [--record]

Every step is a command of `lit-reason` as a user would give it, and is not repeated when its files are there. All
models play the same held-out tasks, which nothing is trained on.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.record import record
from lit_reason.core.metrics_log import read_metrics
from lit_reason.envs.arithmetic import make_task
from lit_reason.metrics.intervals import wilson
from lit_reason.rollout.trajectory import Trajectory, read_ledger

RECIPE, WARM = "grpo/smollm2-arithmetic", "grpo/smollm2-arithmetic-warm"
NOTES = ("other programs ran at the same time", "one seed, one learning rate", "one thread")
TASK = {"operations": 1, "largest": 20}  # as the recipe has it
FIGURES = ("reward", "turn_reward", "outcome", "tool_calls", "tool_errors", "paid/correct", "dead_groups", "entropy")


@dataclass(frozen=True)
class Commands:
    """Runs `lit-reason` in a folder.

    Args:
        out: the folder.
        options: of the on-policy recipe, for training and testing alike.
    """

    out: Path
    options: tuple[str, ...]

    def run(self, made: Path, *words: str) -> None:
        """A command, unless what it makes is there."""
        if made.exists():
            return
        print("lit-reason", *words, flush=True)
        began = time.time()
        with (self.out / f"{made.parent.name}-{made.stem}.log").open("w") as log:
            subprocess.run(
                [sys.executable, "-m", "lit_reason", *words], cwd=self.out, check=True, stdout=log, stderr=log
            )
        spent = os.times()
        print(
            f"  {time.time() - began:.0f} s, {spent.children_user + spent.children_system:.0f} CPU s so far", flush=True
        )

    def fit(self, recipe: str, name: str, *options: str) -> Path:
        """Train; the folder of the exported model."""
        export = self.out / name / "export"
        self.run(export, "fit", f"--config={recipe}", *_logger(name), *options)
        return export

    def test(self, name: str, model: Path) -> Path:
        """Play the held-out tasks, the likeliest token each time; the file of rollouts."""
        file = self.out / f"test-{name}" / "test-rollouts.jsonl"
        words = ("test", f"--config={RECIPE}", f"--model.lm.path={model}", "--model.sampling.temperature=0")
        self.run(file, *words, *self.options, *_logger(f"test-{name}"))
        return file


def _logger(name: str) -> list[str]:
    given = {"save_dir": ".", "name": name, "version": ""}
    return [f"--trainer.logger.init_args.{key}={value}" for key, value in given.items()]


def figures(rollouts: list[Trajectory]) -> dict[str, Any]:
    """What a model did on the held-out tasks.

    Args:
        rollouts: one of each task.

    Returns:
        Counts, and shares with 95 % intervals by Wilson. `valid_calls`: of the turns that were no answer, those whose
        call ran. `useful_calls`: those whose call gave the next step of the task. `exact_match`: of all tasks, those
        that were answered rightly.
    """
    calls = sum(t.facts["calls"] for t in rollouts)
    tried = calls + sum(t.facts["errors"] for t in rollouts)
    useful = [sum("useful" in terms for terms in t.turn_terms) for t in rollouts]
    right = [t.outcome_terms["correct"] > 0 for t in rollouts]
    shares = {
        "valid_calls": (calls, tried),
        "useful_calls": (sum(useful), tried),
        "answered": (sum(t.outcome_terms["answered"] > 0 for t in rollouts), len(rollouts)),
        "exact_match": (sum(right), len(rollouts)),
    }
    found = {
        name: {"of": n, "share": k / n, "interval": list(wilson(k, n))} if n else {"of": 0}
        for name, (k, n) in shares.items()
    }
    return {**found, "calls_a_task": calls / len(rollouts), "tokens_a_task": _mean([t.sampled for t in rollouts])}


def unseen(held_out: list[Trajectory], trained: list[Trajectory], demonstrations: int) -> set[str]:
    """Held-out tasks whose question is not, by chance, one of those that were trained on.

    Args:
        held_out: rollouts of the test.
        trained: rollouts of all rounds.
        demonstrations: how many of the first training tasks were shown.
    """
    numbers = {int(t.row_id.removeprefix("train-")) for t in trained} | set(range(demonstrations))
    questions = {make_task(n, 0, **TASK)["question"] for n in numbers}
    return {
        t.row_id
        for t in held_out
        if make_task(int(t.row_id.removeprefix("test-")), 0, **TASK)["question"] not in questions
    }


def operations(rollouts: list[Trajectory]) -> dict[str, list[int]]:
    """Right answers and tasks, by the operation that the task asks for."""
    found: dict[str, list[int]] = {"+": [0, 0], "-": [0, 0], "*": [0, 0]}
    for t in rollouts:
        ((_, operator, _),) = make_task(int(t.row_id.removeprefix("test-")), 0, **TASK)["calls"]
        found[operator][0] += t.outcome_terms["correct"] > 0
        found[operator][1] += 1
    return found


def changed(before: list[Trajectory], after: list[Trajectory]) -> dict[str, int]:
    """Tasks that only one of two models answered rightly."""
    other = {t.row_id: t.outcome_terms["correct"] > 0 for t in after}
    pairs = [(t.outcome_terms["correct"] > 0, other[t.row_id]) for t in before]
    return {"only_before": sum(a and not b for a, b in pairs), "only_after": sum(b and not a for a, b in pairs)}


def _mean(values: list[int]) -> float:
    return sum(values) / len(values)


def line(name: str, found: dict[str, Any]) -> str:
    """A row of the table, in Markdown."""
    cells = []
    for key in ("valid_calls", "useful_calls", "answered", "exact_match"):
        share = found[key]
        low, high = share.get("interval", (0, 0))
        cells.append(f"{share['share']:.0%} ({low:.0%} to {high:.0%})" if share["of"] else "-")
    return f"| {name} | {' | '.join(cells)} | {found['tokens_a_task']:.0f} |"


def main() -> None:
    """Run what is missing, print the table, and record it when asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="SmolLM2-135M-Instruct: folder or .gguf file")
    parser.add_argument("--out", type=Path, required=True, help="folder for everything")
    parser.add_argument("--demonstrations", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=200, help="of GRPO")
    parser.add_argument("--hours", type=float, default=24.0, help="GRPO stops after so many")
    parser.add_argument("--tasks", type=int, default=100, help="held out")
    parser.add_argument("--record", action="store_true", help="write the figures to benchmarks/results")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    model, out = given.model.resolve(), given.out.resolve()
    cpu = ("--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false")
    do = Commands(out, (f"--data.test_count={given.tasks}", f"--data.batch_rows={given.tasks}", *cpu))
    rows = out / "demonstrations.jsonl"
    do.run(rows, "demonstrate", str(rows), f"--config={RECIPE}", f"--count={given.demonstrations}")
    warm = do.fit(WARM, "warm", f"--model.lm.path={model}", f"--data.train_file={rows}", *cpu)
    limit = (f"--trainer.max_steps={given.rounds}", f"--trainer.max_time=00:{_clock(given.hours)}")
    trained = do.fit(RECIPE, "grpo", f"--model.lm.path={warm}", *limit, *cpu)
    models = {"untouched": model, "warm": warm, "grpo": trained}
    ledgers = {name: do.test(name, folder) for name, folder in models.items()}
    played = {name: list(read_ledger(file)) for name, file in ledgers.items()}
    found = {name: figures(rollouts) for name, rollouts in played.items()}
    print("| model | valid calls | useful calls | answered | exact match | tokens a task |\n|---|---|---|---|---|---|")
    print("\n".join(line(name, figures) for name, figures in found.items()))
    rounds = list(read_ledger(out / "grpo/rollouts.jsonl"))
    new = unseen(played["grpo"], rounds, given.demonstrations)
    found_new = {name: figures([t for t in rollouts if t.row_id in new]) for name, rollouts in played.items()}
    print(f"\nthe same on the {len(new)} tasks whose question was not trained on by chance")
    print("\n".join(line(name, figures) for name, figures in found_new.items()))
    pair = changed(played["warm"], played["grpo"])
    print(f"\nwarm start against GRPO: {pair}; {len(rounds)} rollouts of training")
    if given.record:
        log = read_metrics(out / "grpo/metrics.csv")
        curves = {name: [round(v, 4) for _, v in log.points(f"train/{name}")] for name in FIGURES}
        by_operation = {name: operations(rollouts) for name, rollouts in played.items()}
        result = {
            "held_out_tasks": given.tasks, "demonstrations": given.demonstrations, "training_rollouts": len(rounds),
            "models": found, "unseen_questions": len(new), "models_on_unseen": found_new,
            "by_operation": by_operation, "warm_start_against_grpo": pair, "rounds": curves,
        }  # fmt: skip
        options = f"--demonstrations {given.demonstrations} --hours {given.hours:g} --tasks {given.tasks} --record"
        command = f"python -m benchmarks.turn_level_smollm2 --model {model.name} --out runs/smollm2-tool {options}"
        print(record("turn_level_smollm2", result, NOTES, command=command))


def _clock(hours: float) -> str:
    """Hours as Lightning's `max_time` behind the days reads them."""
    minutes = round(hours * 60)
    return f"{minutes // 60:02}:{minutes % 60:02}:00"


if __name__ == "__main__":
    main()
