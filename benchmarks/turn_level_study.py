"""Does credit by turn pay? Rules compared on ladders of 2, 4 and 6 turns, the learning rate swept for each.

    python -m benchmarks.turn_level_study --out runs/turn-level [--minutes 70] [--record]

The policy is a 0.1 M-parameter transformer, warm-started on noisy demonstrations. Every turn pays 0.7 for the right
word plus a coin of 0 or 1 that no policy can influence; the outcome pays 1 if every turn was right. Each rule's rate is
the best of `RATES` on `SWEEP_SEEDS`, with a worse one on either side; the table is of `TEST_SEEDS`. A run ends when its
success, over the last `WINDOW` rounds, reaches 90 %, or after `MOST_ROUNDS`. Every finished run is a line of
OUT/runs.jsonl and is not repeated.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import random
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.lowrank_study import interval
from benchmarks.record import record

RULES = ("traj_mr", "mt_grpo_k", "turn_rtg", "flat_content", "traj_or", "gae")
TASKS = {"K=6": 6, "K=2": 2, "K=4": 4, "K=6 chained": 6}  # in the order in which they are run
MOST_ROUNDS = {2: 100, 4: 120, 6: 150}
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
FIRST_RATES = (1e-3, 3e-4, 3e-3)  # tried always; further ones while the best of them is at an end
SWEEP_SEEDS, TEST_SEEDS = (100,), (0, 1, 2, 3, 4)
WINDOW, ROLLOUTS, GOAL = 5, 64, 0.9
DEMONSTRATIONS, SHARE_RIGHT, WARM_STEPS = 600, 0.3, 120
SYMBOLS, WORDS = ("c0", "c1", "c2", "c3"), ("a0", "a1", "a2", "a3", "a4", "a5")


@dataclass(frozen=True, order=True)
class Run:
    """One training run."""

    task: str
    rule: str
    lr: float
    seed: int


def warm_start(folder: Path, turns: int) -> None:
    """Train the student on demonstrations of which few are right; the result lies in `folder/export`."""
    from lit_reason.cli.reason_cli import build
    from lit_reason.envs.ladder import Ladder
    from lit_reason.tasks.student import write_student

    write_student(folder / "base", [*SYMBOLS, *WORDS])
    ladder, rng = Ladder(SYMBOLS, WORDS, rungs=turns), random.Random(0)
    with (folder / "demonstrations.jsonl").open("w") as file:
        for i in range(DEMONSTRATIONS):
            messages = []
            for shown, right in zip(ladder.task(i, 1)["shown"], ladder.right, strict=True):
                said = right[shown] if rng.random() < SHARE_RIGHT else rng.choice(WORDS)
                messages += [{"role": "user", "content": shown}, {"role": "assistant", "content": said}]
            file.write(json.dumps({"messages": messages}) + "\n")
    options = [
        "--config=smoke/sft",
        f"--vars.folder={folder}",
        f"--data.train_file={folder / 'demonstrations.jsonl'}",
        "--data.condense.strategy=full",
        "--data.batch_rows=32",
        "--model.lm.overrides.attention_dropout=0.0",
        "--model.optim.lr=0.003",
        f"--trainer.max_steps={WARM_STEPS}",
        "--trainer.callbacks=[HFExport]",
    ]
    cli = build("fit", options)
    cli.run_verb()
    export = next(Path(cli.trainer.logger.log_dir).glob("export"))
    export.rename(folder / "export")


def options_of(run: Run, folder: Path) -> list[str]:
    """Options of `lit-reason fit` for a run, on top of the smoke recipes."""
    critic = run.rule == "gae"
    rule = (
        ["--model.critic.trunk=separate", "--model.critic.lr=0.003"] if critic else [f"--model.credit.rule={run.rule}"]
    )
    return [
        f"--config=smoke/{'ppo' if critic else 'grpo'}",
        f"--vars.folder={folder}",
        f"--model.lm.path={folder / 'export'}",
        "--model.lm.overrides.attention_dropout=0.0",
        f"--model.optim.lr={run.lr}",
        "--model.policy.entropy=0.0",
        f"--model.dialogue.max_turns={TASKS[run.task]}",
        f"--model.sampling.seed={run.seed}",
        *rule,
        f"--data.env.symbols={list(SYMBOLS)}",
        f"--data.env.words={list(WORDS)}",
        f"--data.env.rungs={TASKS[run.task]}",
        "--data.env.coin_reward=1.0",
        f"--data.env.chained={'chained' in run.task}",
        "--data.count=4096",
        f"--data.seed={run.seed}",
        f"--seed_everything={run.seed}",
        f"--trainer.max_steps={MOST_ROUNDS[TASKS[run.task]]}",
        f"--trainer.logger.init_args.name=rl-{run.seed}",
    ]


def train(run: Run, folder: Path, result: Path) -> None:
    """One run, in a process of its own; its figures become a file."""
    import torch
    from lightning.pytorch.callbacks import Callback

    from lit_reason.cli.reason_cli import build

    class Success(Callback):
        """Share of the rollouts of each round in which every turn was right; stops at the goal."""

        def __init__(self) -> None:
            self.by_round: list[float] = []
            self.tokens: list[float] = []

        def on_train_batch_end(self, trainer: Any, model: Any, *_: Any) -> None:
            found = trainer.callback_metrics
            self.by_round.append(float(found["train/outcome"]))
            self.tokens.append(float(found["train/sampled_tokens"]) * ROLLOUTS)
            last = self.by_round[-WINDOW:]
            trainer.should_stop = len(last) == WINDOW and sum(last) / WINDOW >= GOAL

    torch.set_num_threads(1)
    cli = build("fit", options_of(run, folder))
    success = Success()
    cli.trainer.callbacks.append(success)
    cpu = time.process_time()
    cli.run_verb()
    by_round = success.by_round
    reached = len(by_round) if sum(by_round[-WINDOW:]) / WINDOW >= GOAL else None
    figures = {
        "rounds": reached,
        "tokens": None if reached is None else sum(success.tokens),
        "final": statistics.fmean(by_round[-WINDOW:]),
        "cpu_seconds": time.process_time() - cpu,
        "success": [round(value, 4) for value in by_round],
    }
    result.write_text(json.dumps(figures))


class Study:
    """Runs, each made once.

    Args:
        out: folder of the study.
        stop_at: no run begins after this time, in seconds since the epoch.
    """

    def __init__(self, out: Path, stop_at: float) -> None:
        self.out, self.stop_at, self.file = out, stop_at, out / "runs.jsonl"
        lines = self.file.read_text().splitlines() if self.file.exists() else []
        self.done = {Run(**line.pop("run")): line for line in map(json.loads, lines)}

    def folder(self, task: str) -> Path:
        """Where a task's warm start and its runs lie."""
        return self.out / task.replace(" ", "-")

    def make(self, run: Run) -> dict[str, Any]:
        """What came out of a run, which is trained if it was not yet.

        Raises:
            TimeoutError: there is no time left to begin it.
        """
        if run not in self.done:
            if time.time() > self.stop_at:
                raise TimeoutError
            folder = self.folder(run.task)
            result = folder / f"{run.rule}-{run.lr:g}-{run.seed}.json"
            if not (folder / "export").exists():
                folder.mkdir(parents=True, exist_ok=True)
                in_a_process(warm_start, folder, TASKS[run.task])
            result.unlink(missing_ok=True)
            in_a_process(train, run, folder, result)
            found = json.loads(result.read_text())
            with self.file.open("a") as file:
                file.write(json.dumps({"run": asdict(run), **found}) + "\n")
            self.done[run] = found
            print(f"{run.task:12} {run.rule:13} lr {run.lr:<7g} seed {run.seed:3}: {found['rounds']}", flush=True)
        return self.done[run]

    def complete(self, task: str, rule: str) -> None:
        """Sweep the rate of a rule, then run the test seeds."""
        tried = list(FIRST_RATES)
        while True:
            best = min(tried, key=lambda lr: mean_rank([self.make(Run(task, rule, lr, s)) for s in SWEEP_SEEDS]))
            beyond = [lr for lr in neighbours(best) if lr not in tried]
            if not beyond:
                break
            tried += beyond
        for seed in TEST_SEEDS:
            self.make(Run(task, rule, best, seed))

    def rows(self) -> Iterator[dict[str, Any]]:
        """The table: one row for each task and rule whose sweep is done."""
        for task, turns in TASKS.items():
            for rule in RULES:
                swept = {lr: [self.done.get(Run(task, rule, lr, s)) for s in SWEEP_SEEDS] for lr in RATES}
                swept = {lr: found for lr, found in swept.items() if None not in found}
                if not set(FIRST_RATES) <= set(swept):
                    continue
                lr = min(swept, key=lambda lr: mean_rank(swept[lr]))
                runs = {s: self.done[Run(task, rule, lr, s)] for s in TEST_SEEDS if Run(task, rule, lr, s) in self.done}
                if runs:
                    rounds = {seed: found["rounds"] or MOST_ROUNDS[turns] for seed, found in runs.items()}
                    reached = sum(found["rounds"] is not None for found in runs.values())
                    final = statistics.fmean(found["final"] for found in runs.values())
                    row = {"task": task, "rule": rule, "lr": lr, "rounds": rounds, "reached": reached, "final": final}
                    yield {**row, "swept": sorted(swept)}


def neighbours(lr: float) -> list[float]:
    """The rates beside one of `RATES`."""
    at = RATES.index(lr)
    return [RATES[i] for i in (at - 1, at + 1) if 0 <= i < len(RATES)]


def mean_rank(runs: list[Any]) -> tuple[float, float]:
    """What a rate is chosen by: rounds to the goal, then success at the end."""
    rounds = statistics.fmean(r["rounds"] or 10_000 for r in runs)
    return rounds, -statistics.fmean(statistics.fmean(r["success"][-30:]) for r in runs)


def in_a_process(function: Any, *arguments: Any) -> None:
    """Call a function in a fork of this process, which has imported all it needs.

    Raises:
        RuntimeError: it failed.
    """
    child = multiprocessing.get_context("fork").Process(target=function, args=arguments)
    child.start()
    child.join()
    if child.exitcode:
        raise RuntimeError(f"{function.__name__} ended with exit code {child.exitcode}")


def lines(rows: list[dict[str, Any]]) -> Iterator[str]:
    """The table as Markdown. Runs that did not get there count as `MOST_ROUNDS`, so `>=` stands before their means."""
    yield "| task | rule | rate | reached | rounds | 95 % | tokens | of `traj_mr` | of `flat_content` | success |"
    yield "|---|---|---|---|---|---|---|---|---|---|"
    by_name = {(row["task"], row["rule"]): row["rounds"] for row in rows}
    for row in rows:
        seeds, task = row["rounds"], row["task"]
        mean, half = interval(list(seeds.values()))
        most, turns = MOST_ROUNDS[TASKS[task]], TASKS[task]
        sign = "" if row["reached"] == len(seeds) else ">= "
        around = "-" if half is None else f"{max(mean - half, 0):.0f} to {min(mean + half, most):.0f}"
        tokens = f"{sign}{mean * ROLLOUTS * turns:,.0f}"
        ratios = [
            "-" if row["rule"] == other else ratio(seeds, by_name.get((task, other), {}))
            for other in ("traj_mr", "flat_content")
        ]
        yield (
            f"| {task} | `{row['rule']}` | {row['lr']:g} | {row['reached']}/{len(seeds)} | {sign}{mean:.0f} | "
            f"{around} | {tokens} | {' | '.join(ratios)} | {row['final']:.2f} |"
        )


def ratio(rounds: dict[int, int], others: dict[int, int]) -> str:
    """Rounds as a share of another rule's, with an interval, seed by seed, since equal seeds share their tasks."""
    logs = [math.log(n / others[seed]) for seed, n in rounds.items() if seed in others]
    if not logs:
        return "-"
    mean, half = interval(logs)
    around = "" if half is None else f" ({math.exp(mean - half):.2f} to {math.exp(mean + half):.2f})"
    return f"{math.exp(mean):.2f}{around}"


def plot(study: Study, rows: list[dict[str, Any]], file: Path) -> None:
    """Success by round, a running mean over `WINDOW` rounds, averaged over seeds; a run at its goal stays there.

    Args:
        study: its runs.
        rows: of the table; tasks with three rules or more get a panel.
        file: SVG to write.
    """
    from matplotlib.figure import Figure

    counted = {task: [row for row in rows if row["task"] == task] for task in sorted(TASKS)}
    shown = {task: several for task, several in counted.items() if len(several) > 1}
    figure = Figure(figsize=(3.4 * len(shown), 3.3), layout="constrained")
    colours = dict(zip(RULES, ("#0072b2", "#d55e00", "#009e73", "#e69f00", "#000000", "#cc79a7"), strict=True))
    for axes, (task, several) in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown.items(), strict=True):
        for row in several:
            curves = []
            for seed in row["rounds"]:
                found = study.done[Run(task, row["rule"], row["lr"], seed)]["success"]
                smooth = [statistics.fmean(found[max(i - WINDOW + 1, 0) : i + 1]) for i in range(len(found))]
                curves.append(smooth + smooth[-1:] * (MOST_ROUNDS[TASKS[task]] - len(smooth)))
            mean = [statistics.fmean(values) for values in zip(*curves, strict=True)]
            axes.plot(range(1, len(mean) + 1), mean, color=colours[row["rule"]], label=row["rule"], linewidth=1.5)
        axes.axhline(GOAL, color="0.6", linewidth=0.8, linestyle=":")
        axes.set(title=task, xlabel="rounds of 64 rollouts", ylim=(0, 1))
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("all turns right")
    by_rule = {line.get_label(): line for axes in figure.axes for line in axes.get_lines() if line.get_label() in RULES}
    figure.legend(by_rule.values(), by_rule.keys(), loc="outside lower center", ncols=6, frameon=False)
    figure.savefig(file, metadata={"Date": None})


def main() -> None:
    """Run what the time allows, and say what came out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=70, help="no run begins later than this")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--rules", nargs="+", choices=RULES, default=list(RULES))
    parser.add_argument("--record", action="store_true", help="write what there is to benchmarks/results")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    study = Study(given.out, time.time() + 60 * given.minutes)
    if not given.record:
        import lit_reason.core.trainer
        import lit_reason.regimes.grpo.regime
        import lit_reason.regimes.ppo.regime
        import lit_reason.regimes.sft.regime  # noqa: F401  # so that each run, a fork, need not import again

        try:
            for task in given.tasks:
                for rule in given.rules:
                    study.complete(task, rule)
        except TimeoutError:
            print("out of time: the same command goes on")
    rows = list(study.rows())
    print("\n".join(lines(rows)))
    if given.record:
        runs = [{**asdict(run), **found} for run, found in study.done.items()]
        plot(study, rows, Path("docs/studies/turn_level.svg"))
        print(record("turn_level_study", {"rows": rows, "runs": runs}, command="python -m benchmarks.turn_level_study"))


if __name__ == "__main__":
    main()
