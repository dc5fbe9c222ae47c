"""Does choosing confident activations steer better? Four topics and one style on SmolLM2-135M-Instruct.

python -m benchmarks.steering_study --model SmolLM2-135M-Instruct.Q4_1.gguf --out runs/steering [--each 5] [--cells 40]

Texts are those of Debian's `fortunes` package, fetched with `apt-get download fortunes` unless --fortunes names the
unpacked folder. Every finished cell is a line of OUT/cells.jsonl and is not repeated; the most telling come first.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lit_reason.models.config import ModelConfig
from lit_reason.models.language_model import LanguageModel
from lit_reason.models.loading import load_tokenizer
from lit_reason.rollout.config import SamplingConfig
from lit_reason.steering.bank import FeatureBank, Features
from lit_reason.steering.collect import collected, segment_features, stacked
from lit_reason.steering.config import DirectionConfig, SteerConfig
from lit_reason.steering.direction_file import Directions, model_facts
from lit_reason.steering.finder import solve
from lit_reason.steering.hook import SteeringHook
from lit_reason.steering.judge import WordJudge, distinct
from lit_reason.steering.trial import generate, perplexity

TOPICS = ["food", "law", "science", "sports"]  # looked through; the package has categories that are not for everyone
TARGETS = ["food", "sports"]
METHODS = ["confident", "same_count", "mean_difference"]
MORE_METHODS = ["probe_weight", "mean", "random"]
PER_CLASS = 55  # texts a class that directions are found in; the judge learns from the others
LAYERS = [2, 6, 10, 14, 18, 22, 26]
STRENGTHS = [0.15, 0.25, 0.35]
WORSE = 2.0  # all methods are brought to this many times the perplexity of unsteered continuations
TOKENS = 20
TUNING = """He told me that | We should remember that | A long time ago | The first thing I noticed was
| My friend says that | It turns out that | On Monday morning | What I really want is"""
OPENINGS = """I think that | Once upon a time | The most important thing is | Yesterday, someone told me that
| In my opinion, | Last week we | She opened the door and | There is a reason why | People often say that
| When I was young, | Nobody knows | The best way to | It was a dark night and | If you ask me,
| The new neighbour | After all these years,
| At the end of the day | Let me tell you about | One day, a man | Today I learned that"""


def fortunes(folder: Path | None, out: Path) -> dict[str, list[str]]:
    """Entries of 40 to 500 characters by topic, their line ends made blanks, in the order of the files."""
    if folder is None:
        subprocess.run(["apt-get", "download", "fortunes"], cwd=out, check=True, capture_output=True)
        (package,) = out.glob("fortunes_*.deb")
        subprocess.run(["dpkg-deb", "-x", package.name, "fortunes"], cwd=out, check=True)
        folder = out / "fortunes/usr/share/games/fortunes"
    found = {}
    for topic in TOPICS:
        entries = re.split(r"^%\n", (folder / topic).read_text(encoding="utf-8", errors="replace"), flags=re.MULTILINE)
        texts = [" ".join(entry.split()) for entry in entries]
        found[topic] = list(dict.fromkeys(text for text in texts if 40 <= len(text) <= 500))
    return found


class Bench:
    """Model, tokenizer and what is made of a seed's texts."""

    def __init__(self, model: str, texts: dict[str, list[str]]) -> None:
        config = ModelConfig(path=model, dtype="float32")
        self.lm, self.tokenizer, self.texts = LanguageModel.load(config).eval(), load_tokenizer(config), texts
        self.lm.requires_grad_(False)
        self.layer: int | None = None
        self.kept: dict[tuple[int, str], Directions] = {}
        self.banks: dict[int, FeatureBank] = {}

    def split(self, seed: int) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
        """Labelled texts for the directions, and others for the judge."""
        mine, judge = [], []
        for k, topic in enumerate(TOPICS):
            order = np.random.default_rng([seed, k]).permutation(len(self.texts[topic]))
            named = [(self.texts[topic][i], k) for i in order]
            mine, judge = mine + named[:PER_CLASS], judge + named[PER_CLASS : PER_CLASS + 120]
        return mine, judge

    def bank(self, seed: int, labelled: list[tuple[str, int]], layers: list[int]) -> FeatureBank:
        """Token features of the texts at some layers."""
        bank = FeatureBank(2000, seed)
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
            cut = segment_features(stacked(states, layers), lengths, "token", 1, None)
            labels = np.array([label for _, label in part])[cut.text_N.numpy()]
            numbers = start + cut.text_N.numpy()
            bank.add(Features(cut.features_NLF, cut.norms_NL, labels, numbers, cut.place_N.numpy()))
        return bank

    def directions(self, seed: int, method: str, names: list[str] = TOPICS) -> Directions:
        """The directions of a seed by a method; the layer is chosen by the probes of seed 0, and then kept."""
        if self.layer is None and seed != 0:
            self.directions(0, "confident")
        layers = LAYERS if self.layer is None else [self.layer]
        if seed not in self.banks:
            self.banks[seed] = self.bank(seed, self.split(seed)[0], layers)
        if (seed, method) not in self.kept:
            config = DirectionConfig(method=method, beta=0.5)  # type: ignore[arg-type]
            facts = {"model": model_facts(self.lm.base)}
            found = solve(self.banks[seed], layers, names, config, width=self.lm.base.config.hidden_size, facts=facts)
            if self.layer is None:
                self.layer, self.banks = found.layer, {}
                return self.directions(seed, method)
            self.kept[seed, method] = found
        return self.kept[seed, method]

    def run(self, seed: int, method: str, mix: dict[str, float], strength: float, openings: list[str], n: int) -> Any:
        """Continuations of the openings, `n` of each."""
        sampling = SamplingConfig(
            max_new_tokens=TOKENS, temperature=0.9, top_p=0.95, samples=n, batch_size=100, seed=1000 + seed
        )
        prompts = [self.tokenizer(text).input_ids for text in openings]
        hook = None
        if method != "none":
            hook = SteeringHook(self.lm.base, self.directions(seed, method), SteerConfig(mix=mix, strength=strength))
        return generate(self.lm, self.tokenizer, prompts, sampling, (self.tokenizer.eos_token_id,), hook)


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


def plan() -> Iterator[dict[str, Any]]:
    """Cells in the order of what they tell: tune on other prompts, then 20 openings x 10 continuations a cell."""
    yield {"kind": "tune", "seed": 0, "target": None, "method": "none", "strength": 0.0}
    for methods, seeds in ((METHODS, range(3)), (MORE_METHODS, range(1))):
        for target in TARGETS:
            for method in methods:
                for strength in STRENGTHS:
                    yield {"kind": "tune", "seed": 0, "target": target, "method": method, "strength": strength}
            for seed in seeds:
                if methods is METHODS and target == TARGETS[0] and not seed:
                    yield {"kind": "test", "seed": seed, "target": None, "method": "none"}
                for method in methods:
                    yield {"kind": "test", "seed": seed, "target": target, "method": method}
        if methods is METHODS:
            for seed in (1, 2):
                yield {"kind": "test", "seed": seed, "target": None, "method": "none"}
            for method in METHODS:
                yield {"kind": "sum", "seed": 0, "target": "+".join(TARGETS), "method": method}


def key(cell: dict[str, Any]) -> str:
    """What tells a cell from another."""
    return json.dumps({k: cell.get(k) for k in ("kind", "seed", "target", "method")} | (
        {"strength": cell["strength"]} if cell["kind"] == "tune" else {}))  # fmt: skip


def strength_of(done: dict[str, dict[str, Any]], cell: dict[str, Any]) -> float:
    """The strength that the tuning cells of this method and target give; half of each target's for a sum."""
    targets = TARGETS if cell["kind"] == "sum" else [cell["target"]]
    (plain,) = (c["perplexity"] for c in done.values() if (c["kind"], c["method"]) == ("tune", "none"))
    found = []
    for target in targets:
        rows = [
            c for c in done.values() if c["kind"] == "tune" and (c["target"], c["method"]) == (target, cell["method"])
        ]
        found.append(matched_strength([(c["strength"], c["perplexity"]) for c in rows], WORSE * plain))
    return float(np.mean(found)) / (2**0.5 if cell["kind"] == "sum" else 1)


def run_cell(bench: Bench, cell: dict[str, Any], done: dict[str, dict[str, Any]], each: int) -> dict[str, Any]:
    """One cell's figures, with `each` continuations of every opening."""
    cpu, seed, target = time.process_time(), cell["seed"], cell["target"]
    if cell["method"] == "none":
        strength, mix = 0.0, {}
    else:
        strength = cell["strength"] if cell["kind"] == "tune" else strength_of(done, cell)
        mix = {name: 1.0 for name in (TARGETS if cell["kind"] == "sum" else [target])}
    tune = cell["kind"] == "tune"
    tuning, openings = ([text.strip() for text in listed.split("|")] for listed in (TUNING, OPENINGS))
    texts = bench.run(seed, cell["method"], mix, strength, tuning if tune else openings, 5 if tune else each)
    figures: dict[str, Any] = {**cell, "strength": strength, "perplexity": perplexity(texts), "generations": len(texts)}
    if not tune:
        mine, other = bench.split(seed)
        judge = WordJudge([t for t, _ in other], [k for _, k in other], len(TOPICS))
        verdicts = judge([t.text for t in texts])
        figures["judged"] = {name: sum(v == k for v in verdicts) / len(verdicts) for k, name in enumerate(TOPICS)}
        figures["by_prompt"] = [[sum(v == k for v, t in zip(verdicts, texts, strict=True) if t.prompt == p)
                                 for k in range(len(TOPICS))] for p in range(len(openings))]  # fmt: skip
        figures["judge_accuracy"] = float(
            np.mean([a == b for a, (_, b) in zip(judge([t for t, _ in mine]), mine, strict=True)])
        )
        figures["distinct_2"] = distinct([t.text for t in texts], 2)
        figures["texts"], figures["nll"] = [t.text for t in texts], [(t.nll, t.tokens) for t in texts]
        if cell["method"] != "none":
            found = bench.directions(seed, cell["method"])
            figures["layer"] = found.layer
            figures["facts"] = {
                k: found.facts[k] for k in ("counts", "probe_accuracy", "probe_loss_by_layer", "cosines")
            }
    return {**figures, "cpu_s": round(time.process_time() - cpu, 1)}


def main() -> None:
    """Run what is left of the plan."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder, GGUF file or hub id of SmolLM2-135M-Instruct")
    parser.add_argument("--out", type=Path, required=True, help="folder of results, gone on with when it exists")
    parser.add_argument("--fortunes", type=Path, help="unpacked folder of the package's texts")
    parser.add_argument("--each", type=int, default=10, help="continuations of each of the 20 openings in a test cell")
    parser.add_argument("--cells", type=int, default=10_000, help="stop after so many new cells")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    log = args.out / "cells.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    done = {key(row): row for row in rows}
    left = [cell for cell in plan() if key(cell) not in done][: args.cells]
    bench = Bench(args.model, fortunes(args.fortunes, args.out)) if left else None
    for cell in left:
        assert bench is not None
        bench.layer = next((row["layer"] for row in done.values() if "layer" in row), bench.layer)
        done[key(cell)] = run_cell(bench, cell, done, args.each)
        with log.open("a") as file:
            file.write(json.dumps(done[key(cell)]) + "\n")
        shown = {k: v for k, v in done[key(cell)].items() if k not in ("texts", "by_prompt", "facts")}
        print(json.dumps(shown), flush=True)


if __name__ == "__main__":
    main()
