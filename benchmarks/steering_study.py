"""Does choosing confident activations steer better? Topics, a style, and sums of both on SmolLM2-135M-Instruct.

python -m benchmarks.steering_study --model SmolLM2-135M-Instruct.Q4_1.gguf --out runs/steering [--each 10] [--cells 40]

Texts are those of Debian's `fortunes` package, fetched with `apt-get download fortunes` unless --fortunes names the
unpacked folder, and answers of the model itself. Every finished cell is a line of OUT/cells.jsonl and is not repeated;
the most telling come first. A cell with fewer continuations than --each gets the missing ones.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.steering_tasks import PER_CLASS, Task, styles, topics
from lit_reason.models.config import ModelConfig
from lit_reason.models.language_model import LanguageModel
from lit_reason.models.loading import load_tokenizer
from lit_reason.rollout.config import SamplingConfig
from lit_reason.steering.bank import FeatureBank, Features
from lit_reason.steering.collect import collected, contrast_states, segment_features, stacked
from lit_reason.steering.config import DirectionConfig, SteerConfig
from lit_reason.steering.direction_file import Directions, model_facts
from lit_reason.steering.finder import solve
from lit_reason.steering.hook import SteeringHook
from lit_reason.steering.judge import WordJudge
from lit_reason.steering.trial import generate, perplexity

TARGETS = ("food", "sports", "law", "science")
TASK_OF = {**dict.fromkeys(TARGETS, "topics"), "concise": "style"}
METHODS = ["confident", "same_count", "mean_difference"]
MORE_METHODS = ["probe_weight", "mean", "caa", "act_add", "random"]
LAYERS = [2, 6, 10, 14, 18, 22, 26]
STRENGTHS = [0.15, 0.25, 0.35]
WORSE = 2.0  # all methods are brought to this many times the perplexity of unsteered continuations
BATCH = 50  # sequences of one batch
Cell = dict[str, Any]


class Bench:
    """Model, tokenizer, tasks and what is made of a seed's texts.

    Args:
        model: folder, file or hub id.
        fortunes: unpacked folder of the package's texts; None fetches it.
        out: folder of results.
    """

    def __init__(self, model: str, fortunes: Path | None, out: Path) -> None:
        config = ModelConfig(path=model, dtype="float32")
        self.lm, self.tokenizer = LanguageModel.load(config).eval(), load_tokenizer(config)
        self.lm.requires_grad_(False)
        made = (topics(self.tokenizer, fortunes, out), styles(self.lm, self.tokenizer, out))
        self.tasks = {task.name: task for task in made}
        self.layer: dict[str, int] = {}
        self.kept: dict[tuple[str, int, str], Directions] = {}
        self.bank_of: dict[tuple, FeatureBank] = {}

    def bank(self, task: Task, seed: int, layers: list[int], span: int | None) -> FeatureBank:
        """Token features of a seed's texts at some layers."""
        bank, labelled = FeatureBank(2000, seed), task.split(seed)[0]
        for start in range(0, len(labelled), 16):
            part = labelled[start : start + 16]
            rows = [self.tokenizer(text).input_ids for text, _ in part]
            lengths = [len(row) for row in rows]
            with torch.no_grad(), collected(self.lm.base, layers) as states:
                self.lm.hidden(
                    torch.tensor([i for row in rows for i in row]),
                    torch.cat([torch.arange(n) for n in lengths]),
                    torch.tensor([0, *np.cumsum(lengths)]),
                )
            cut = segment_features(stacked(states, layers), lengths, "token", 1, span)
            labels = np.array([label for _, label in part])[cut.text_N.numpy()]
            numbers = start + cut.text_N.numpy()
            bank.add(Features(cut.features_NLF, cut.norms_NL, labels, numbers, cut.place_N.numpy()))
        return bank

    def directions(self, task: Task, seed: int, method: str) -> Directions:
        """The directions of a seed by a method; the layer is chosen by the probes of seed 0, and then kept."""
        if task.name not in self.layer:
            config = DirectionConfig(method="confident", beta=0.5)
            self.layer[task.name] = self.solve(task, 0, config, LAYERS).layer
        if (task.name, seed, method) not in self.kept:
            config = DirectionConfig(method=method, beta=0.5, contrast=task.contrast)  # type: ignore[arg-type]
            self.kept[task.name, seed, method] = self.solve(task, seed, config, [self.layer[task.name]])
        return self.kept[task.name, seed, method]

    def solve(self, task: Task, seed: int, config: DirectionConfig, layers: list[int]) -> Directions:
        """Directions in a seed's texts, by the method of the settings."""
        span = None if config.method == "caa" else task.span  # that one reads the last token
        wanted = task.name, seed, tuple(layers), span
        if wanted not in self.bank_of:
            self.bank_of = {wanted: self.bank(task, seed, layers, span)}  # one at a time: they are large
        return solve(
            self.bank_of[wanted],
            layers,
            task.classes,
            config,
            width=self.lm.base.config.hidden_size,
            facts={"model": model_facts(self.lm.base)},
            pair_of={number: str(number % PER_CLASS) for number in range(PER_CLASS * len(task.classes))},
            contrasts=contrast_states(self.lm, self.tokenizer, config.contrast, layers, task.classes),
        )

    def run(self, cell: Cell, strengths: dict[str, float], each: int, known: int = 0) -> Any:
        """Continuations of the cell's prompts, `each` of every one, with all its targets added.

        Args:
            cell: what is run.
            strengths: by target.
            each: continuations of each prompt.
            known: how many of each prompt there are already; the new ones are others.
        """
        task = self.tasks[cell["prompts"]]
        sampling = SamplingConfig(
            max_new_tokens=task.tokens,
            temperature=0.9,
            top_p=0.95,
            samples=each,
            batch_size=BATCH,
            seed=1000 + cell["seed"] + 100 * known,
        )
        prompts = task.tuning if cell["kind"] == "tune" else task.prompts
        with ExitStack() as hooks:
            for target, strength in strengths.items():
                found = self.directions(self.tasks[TASK_OF[target]], cell["seed"], cell["method"])
                steer = SteerConfig(mix={target: 1.0}, strength=strength)
                hooks.enter_context(SteeringHook(self.lm.base, found, steer))
            return generate(self.lm, self.tokenizer, prompts, sampling, (self.tokenizer.eos_token_id,), hooks)


def matched_strength(points: list[tuple[float, float]], limit: float) -> float:
    """Strength at which the perplexity reaches the limit: linear in its logarithm between, and beyond, the two nearest.

    Args:
        points: (strength, perplexity).
        limit: wanted perplexity.
    """
    x, y = (np.array(column, dtype=float) for column in zip(*sorted(points), strict=True))
    y = np.log(y)
    at = int(np.clip(np.searchsorted(y, np.log(limit)), 1, len(y) - 1))
    slope = (y[at] - y[at - 1]) / (x[at] - x[at - 1])
    return float(np.clip(x[at - 1] + (np.log(limit) - y[at - 1]) / slope, x[0] / 2, x[-1] * 1.5))


def tuning(target: str, methods: list[str], strengths: list[float] = STRENGTHS) -> Iterator[Cell]:
    """Cells on other prompts, without directions and at some strengths."""
    same = {"kind": "tune", "seed": 0, "prompts": TASK_OF[target]}
    yield {**same, "target": None, "method": "none", "strength": 0.0}
    for method in methods:
        for strength in strengths:
            yield {**same, "target": target, "method": method, "strength": strength}


def testing(target: str, methods: list[str], seeds: range) -> Iterator[Cell]:
    """Cells at the strengths found, and without directions."""
    for seed in seeds:
        for method in ["none", *methods]:
            wanted = None if method == "none" else target
            yield {"kind": "test", "seed": seed, "target": wanted, "method": method, "prompts": TASK_OF[target]}


def summing(first: str, second: str, method: str, seeds: range) -> Iterator[Cell]:
    """Two directions together, and each alone at the strength that it has in the sum."""
    for seed in seeds:
        for target in (f"{first}+{second}", first, second):
            yield {"kind": "sum", "seed": seed, "target": target, "method": method, "prompts": TASK_OF[second]}


def plan() -> Iterator[Cell]:
    """Cells in the order of what they tell."""
    seeds = range(3)
    for target in TARGETS:
        yield from tuning(target, METHODS)
        yield from testing(target, METHODS, seeds)
    yield from summing("food", "sports", "confident", seeds)
    yield from tuning("food", MORE_METHODS)
    yield from testing("food", MORE_METHODS, seeds)
    yield from tuning("concise", METHODS, STRENGTHS[::2])
    yield from testing("concise", METHODS, seeds)
    yield from summing("food", "concise", "confident", seeds)
    yield from tuning("concise", MORE_METHODS, STRENGTHS[::2])
    yield from testing("concise", MORE_METHODS, range(1))


def key(cell: Cell) -> str:
    """What tells a cell from another."""
    names = ("kind", "seed", "target", "method", "prompts", *(("strength",) if cell["kind"] == "tune" else ()))
    return json.dumps({name: cell[name] for name in names})


def strength_of(done: dict[str, Cell], target: str, method: str) -> float:
    """The strength that the tuning cells of a method and target give."""
    tuned = [cell for cell in done.values() if (cell["kind"], cell["prompts"]) == ("tune", TASK_OF[target])]
    (plain,) = (cell["perplexity"] for cell in tuned if cell["method"] == "none")
    rows = [cell for cell in tuned if (cell["target"], cell["method"]) == (target, method)]
    points = [(cell["strength"], cell["perplexity"]) for cell in rows]
    return matched_strength(points, WORSE * plain)


def run_cell(bench: Bench, cell: Cell, done: dict[str, Cell], each: int) -> Cell:
    """One cell's figures, with `each` continuations of every prompt.

    Args:
        bench: the model and its tasks.
        cell: what is run; finished in part, it keeps what it has.
        done: finished cells by key, with those that strengths are chosen by.
        each: continuations of a prompt.
    """
    cpu, tune, before = time.process_time(), cell["kind"] == "tune", done.get(key(cell))
    if before is not None:
        strengths = before["strengths"]
    elif cell["method"] == "none":
        strengths = {}
    elif tune:
        strengths = {cell["target"]: cell["strength"]}
    else:
        share = 0.5**0.5 if cell["kind"] == "sum" else 1.0
        strengths = {t: share * strength_of(done, t, cell["method"]) for t in cell["target"].split("+")}
    known = before["each"] if before else 0
    each = 5 if tune else each
    texts = bench.run(cell, strengths, each - known, known)
    figures = {"strengths": strengths, "each": each}
    if tune:
        figures |= {"perplexity": perplexity(texts)}
    else:
        figures |= joined(before, judged(bench, cell, texts))
        found = {name: bench.directions(bench.tasks[TASK_OF[name]], cell["seed"], cell["method"]) for name in strengths}
        wanted = ("counts", "probe_accuracy", "probe_loss_by_layer", "cosines")
        figures["facts"] = {name: {k: d.facts[k] for k in wanted} for name, d in found.items()}
    spent = time.process_time() - cpu + (before["cpu_s"] if before else 0)
    return {**cell, **figures, "layers": dict(bench.layer), "cpu_s": round(spent, 1)}


def joined(before: Cell | None, now: Cell) -> Cell:
    """Two parts of a cell as one: counts of each prompt are added, texts put one after the other."""
    if before is None:
        return now
    whole = dict(now)
    whole["by_prompt"] = {
        name: (np.array(before["by_prompt"][name]) + np.array(rows)).tolist() for name, rows in now["by_prompt"].items()
    }
    for name in ("ended", "tokens", "nll"):
        whole[name] = (np.array(before[name]) + np.array(now[name])).tolist()
    whole["texts"] = before["texts"] + now["texts"]
    return whole


def judged(bench: Bench, cell: Cell, texts: Any) -> dict[str, Any]:
    """What becomes of the continuations, prompt by prompt: judges' verdicts, how many end by themselves, likelihood."""
    task = bench.tasks[cell["prompts"]]
    verdicts, accuracy = {}, {}
    for name in dict.fromkeys(("topics", task.name)):
        mine, other = bench.tasks[name].split(cell["seed"])
        classes = len(bench.tasks[name].classes)
        judge = WordJudge([text for text, _ in other], [k for _, k in other], classes)
        said = np.array(judge([t.text for t in texts]))
        verdicts[name] = [
            np.bincount(said[[t.prompt == p for t in texts]], minlength=classes).tolist()
            for p in range(len(task.prompts))
        ]
        accuracy[name] = float(np.mean(np.array(judge([t for t, _ in mine])) == [k for _, k in mine]))
    by_prompt = [[t for t in texts if t.prompt == p] for p in range(len(task.prompts))]
    return {
        "by_prompt": verdicts,
        "judge_accuracy": accuracy,
        "ended": [sum(t.tokens < task.tokens for t in part) for part in by_prompt],
        "tokens": [sum(t.tokens for t in part) for part in by_prompt],
        "nll": [sum(t.nll for t in part) for part in by_prompt],
        "texts": [t.text for t in texts],
    }


def main() -> None:
    """Run what is left of the plan."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder, GGUF file or hub id of SmolLM2-135M-Instruct")
    parser.add_argument("--out", type=Path, required=True, help="folder of results, gone on with when it exists")
    parser.add_argument("--fortunes", type=Path, help="unpacked folder of the package's texts")
    parser.add_argument("--each", type=int, default=10, help="continuations of each of the 20 prompts of a test")
    parser.add_argument("--cells", type=int, default=10_000, help="stop after so many new cells")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    log = args.out / "cells.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    done = {key(row): row for row in rows}
    enough = {name for name, row in done.items() if row["each"] >= args.each or row["kind"] == "tune"}
    left = list({key(cell): cell for cell in plan() if key(cell) not in enough}.values())[: args.cells]
    bench = Bench(args.model, args.fortunes, args.out) if left else None
    for cell in left:
        assert bench is not None
        for row in rows:
            bench.layer.update(row["layers"])
        done[key(cell)] = run_cell(bench, cell, done, args.each)
        with log.open("a") as file:
            file.write(json.dumps(done[key(cell)]) + "\n")
        shown = ("kind", "seed", "target", "method", "prompts", "strengths", "each", "cpu_s")
        print(json.dumps({name: done[key(cell)][name] for name in shown}), flush=True)


if __name__ == "__main__":
    main()
