"""Reward calls and reward tokens that spans, memory and a shared prompt save, and what spans cost in error.

    python -m benchmarks.attribution_savings [--record]

Spans, memory of coalitions and the shared prompt are counted on the classifier of `benchmarks.attribution`, memory of
equal answers in a run of `benchmarks.shaping_study`. Counts repeat exactly; only the CPU seconds depend on the machine.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import shaping_study
from benchmarks.attribution import PROMPT, RESPONSES, VOCABULARY, P, reward_model
from benchmarks.record import record
from lit_reason.rewards.attribution.attributor import Attributor, Explanation
from lit_reason.rewards.attribution.config import AttributionConfig
from lit_reason.rewards.classifier import ClassifierReward

SPANS = (1, 2, 3, 4, 6)
TOGETHER = ("prefix", "shap", "owen", "lime")
PROMPTS = (16, 64, 256)
ROUNDS = 5
COPIES = 64  # a batch


def answered(number: int, prompt: int = PROMPT) -> tuple[list[int], list[int]]:
    """A random prompt and a random response of `P` tokens."""
    g = torch.Generator().manual_seed(number)
    draw = torch.randint(1, VOCABULARY, (prompt + P,), generator=g).tolist()
    return draw[:prompt], draw[prompt:]


def explained(score: ClassifierReward, number: int, *explainers: str, **settings: Any) -> Explanation:
    """One response under some explainers, by an attributor that has seen nothing."""
    return Attributor(explainers, AttributionConfig(batch=COPIES, **settings)).explain(score, *answered(number))


def spans(score: ClassifierReward) -> list[dict[str, float]]:
    """Calls a response by tokens of a span, and how far credit is from that of single tokens by enumeration."""
    rows = []
    for size in SPANS:
        calls, errors, span_errors = [], [], []
        for number in range(RESPONSES):
            truth_T = explained(score, number, "shap", shapley="exact").credit_KT[0]
            e = explained(score, number, "shap", players="span", span_tokens=size)
            calls.append(e.calls)
            errors.append(_error(e.credit_KT[0], truth_T))
            by_span = [credit_T.view(-1, size).sum(1) for credit_T in (e.credit_KT[0], truth_T)]
            span_errors.append(_error(*by_span))
        means = [statistics.fmean(values) for values in (calls, errors, span_errors)]
        rows.append({"span": size, **dict(zip(("calls", "error", "span_error"), means, strict=True))})
    return rows


def _error(found_T: Tensor, truth_T: Tensor) -> float:
    return float((found_T - truth_T).norm() / truth_T.norm())


def coalitions(score: ClassifierReward) -> dict[str, float]:
    """Calls of several explainers of one response, alone and together: what one asked for is known to the others."""
    alone = {name: statistics.fmean(explained(score, n, name).calls for n in range(RESPONSES)) for name in TOGETHER}
    both = statistics.fmean(explained(score, n, *TOGETHER).calls for n in range(RESPONSES))
    return {**alone, "sum": sum(alone.values()), "together": both}


def answers(folder: Path) -> dict[str, Any]:
    """Calls of a training run with and without memory of answers, by quarters of the run; the runs are the same."""
    shaping_study.prepare(folder)
    run = shaping_study.Run("shap", 0.01, 0)
    found: dict[str, Any] = {}
    rewards = []
    for name, kept in (("with", 4096), ("without", 0)):
        done = shaping_study.train(run, folder, (f"--model.attribution.cache={kept}",))
        calls = [0.0, *(s["calls"] for s in done["steps"])]
        quarter = shaping_study.STEPS // 4
        found[name] = [calls[i + quarter] - calls[i] for i in range(0, shaping_study.STEPS, quarter)]
        rewards.append([s["reward"] for s in done["steps"]])
    if rewards[0] != rewards[1]:
        raise RuntimeError("memory of answers changed the run")
    return found


def shared_prompt(folder: str) -> list[dict[str, Any]]:
    """Tokens through the classifier and CPU seconds of one response's credit, by length of its prompt."""
    rows = []
    for prompt in PROMPTS:
        tokens: dict[bool, int] = {}
        ratios = []
        for number in range(ROUNDS + 1):  # the first one warms up
            spent = {}
            for shared in (True, False):
                score = ClassifierReward(folder, share_prompt=shared)
                score.load()
                began = time.process_time()
                explain = Attributor(("shap",), AttributionConfig(batch=COPIES)).explain
                calls = explain(score, *answered(number, prompt)).calls
                spent[shared] = time.process_time() - began
                tokens[shared] = score.tokens
            ratios.append(spent[False] / spent[True])
        times = sorted(ratios[1:])
        rows.append({"prompt": prompt, "calls": calls, "shared": tokens[True], "whole": tokens[False], "times": times})
    return rows


def main() -> None:
    """Count, print, and record where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        reward_model(folder)
        score = ClassifierReward(folder)
        found: dict[str, Any] = {"threads": 1, "players": P, "spans": spans(score), "coalitions": coalitions(score)}
        found["shared_prompt"] = shared_prompt(folder)
        found["answers"] = answers(Path(folder) / "study")
    for name, value in found.items():
        print(name, value)
    if args.record:
        record("attribution_savings", found, ["CPU seconds, shared and whole taking turns"])


if __name__ == "__main__":
    main()
