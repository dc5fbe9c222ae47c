"""Shapley credit of tokens beside captum and shap, on the same reward model: CPU seconds to the same error.

    python -m benchmarks.attribution [--record]

The reward is a 2-layer sequence classifier of width 128 with random weights, the response has 12 tokens behind a prompt
of 64, so the exact values are known by enumeration. Each method is run with several budgets on each response, methods
taking turns; its error falls as a power of its cost, and the cost at `ERROR` is read off that line. The packages call
the classifier as it is; a row `on our scorer` gives them the shared prompt, to tell both gains apart.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.record import record
from lit_reason.rewards.attribution.game import Game
from lit_reason.rewards.attribution.players import players_of
from lit_reason.rewards.attribution.shapley import exact, kernel, permutation
from lit_reason.rewards.classifier import ClassifierReward

P, PROMPT, RESPONSES, BATCH = 12, 64, 5, 64
BUDGETS = (72, 264, 1056)  # coalitions
ERROR = 0.05  # of the norm of the exact values
VOCABULARY = 200
OURS = "Kernel SHAP, whole sizes first"

Worth = Callable[[Tensor], Tensor]


def reward_model(folder: str) -> None:
    """Write the classifier."""
    from transformers import LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=VOCABULARY, num_labels=1, pad_token_id=0, initializer_range=0.12, **sizes)
    LlamaForSequenceClassification(config).save_pretrained(folder)


def ours(estimator: Callable[..., Tensor]) -> Callable[[Worth, int, int], Tensor]:
    """One of the project's estimators."""
    return lambda worth, budget, seed: estimator(worth, P, budget, torch.Generator().manual_seed(seed))


def captum(kind: str) -> Callable[[Worth, int, int], Tensor]:
    """An estimator of captum, in batches."""

    def run(worth: Worth, budget: int, seed: int) -> Tensor:
        import captum.attr

        torch.manual_seed(seed)
        method = getattr(captum.attr, kind)(lambda z: worth(z > 0.5))
        samples = budget if kind == "KernelShap" else max(budget // P, 1)
        found = method.attribute(torch.ones(1, P), n_samples=samples, perturbations_per_eval=BATCH)
        return found[0].double()

    return run


def shap(kind: str) -> Callable[[Worth, int, int], Tensor]:
    """An estimator of shap, which batches by itself."""

    def run(worth: Worth, budget: int, seed: int) -> Tensor:
        import numpy as np
        import shap as package

        def score(z: Any) -> Any:
            return worth(torch.tensor(np.asarray(z) > 0.5)).numpy()

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if kind == "Kernel":
                np.random.seed(seed)
                explain = package.KernelExplainer(score, np.zeros((1, P)), seed=seed)
                return torch.tensor(explain.shap_values(np.ones((1, P)), nsamples=budget, silent=True)[0])
            explain = package.PermutationExplainer(score, np.zeros((1, P)), seed=seed)
            return torch.tensor(explain(np.ones((1, P)), max_evals=max(budget, 2 * P + 1), silent=True).values[0])

    return run


METHODS: dict[str, tuple[Callable[[Worth, int, int], Tensor], bool]] = {
    OURS: (ours(kernel), True),
    "antithetic permutations": (ours(permutation), True),
    "captum ShapleyValueSampling": (captum("ShapleyValueSampling"), False),
    "captum KernelShap": (captum("KernelShap"), False),
    "captum KernelShap on our scorer": (captum("KernelShap"), True),
    "shap PermutationExplainer": (shap("Permutation"), False),
    "shap KernelExplainer": (shap("Kernel"), False),
    "shap KernelExplainer on our scorer": (shap("Kernel"), True),
}


class Counted:
    """The worth of coalitions in batches of `BATCH`, without memory of earlier ones, and how many were asked for."""

    def __init__(self, score: ClassifierReward, prompt: list[int], response: list[int]) -> None:
        self.score, self.prompt, self.response, self.calls = score, prompt, response, 0

    def __call__(self, present: Tensor) -> Tensor:
        self.calls += len(present)
        head = torch.ones((len(present), len(self.prompt)), dtype=torch.bool)
        seen = torch.cat([head, present.reshape(-1, P)], 1)
        ids = torch.tensor([*self.prompt, *self.response]).expand(len(present), -1)
        parts = range(0, len(present), BATCH)
        return torch.cat([self.score(ids[a : a + BATCH], seen[a : a + BATCH]) for a in parts]).double()


def measure(
    scorers: dict[bool, ClassifierReward], number: int, methods: list[str]
) -> dict[str, list[dict[str, float]]]:
    """Error and cost of every method at every budget, on one response."""
    g = torch.Generator().manual_seed(number)
    prompt = torch.randint(1, VOCABULARY, (PROMPT,), generator=g).tolist()
    response = torch.randint(1, VOCABULARY, (P,), generator=g).tolist()
    truth = exact(Counted(scorers[True], prompt, response), P)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in methods}
    for budget in BUDGETS:
        for name in methods:
            run, shared = METHODS[name]
            own = name in (OURS, "antithetic permutations")
            worth: Any = Counted(scorers[shared], prompt, response)
            if own:
                worth = Game(scorers[shared], prompt, response, players_of(response, "token"), batch=BATCH)
            began = time.process_time()
            values = run(worth, budget, number)
            spent = time.process_time() - began
            error = float((values - truth).norm() / truth.norm())
            found[name].append({"budget": budget, "calls": worth.calls, "cpu": spent, "error": error})
    return found


def at_error(points: list[dict[str, float]], of: str) -> float | None:
    """What a method spends to come to `ERROR`, by a line through logarithms of cost and error."""
    x = [math.log(p[of]) for p in points]
    y = [math.log(max(p["error"], 1e-12)) for p in points]
    mx, my = statistics.fmean(x), statistics.fmean(y)
    slope = sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True)) / sum((a - mx) ** 2 for a in x)
    return None if slope >= 0 else math.exp(mx + (math.log(ERROR) - my) / slope)


def summary(rounds: list[dict[str, list[dict[str, float]]]]) -> dict[str, Any]:
    """For each method its mean error and cost by budget, and its cost at `ERROR` over that of ours."""
    table: dict[str, Any] = {}
    pooled = {
        name: [
            {
                key: statistics.geometric_mean(max(r[name][b][key], 1e-12) for r in rounds)
                for key in ("cpu", "error", "calls")
            }
            for b in range(len(BUDGETS))
        ]
        for name in rounds[0]
    }
    base = {of: at_error(pooled[OURS], of) for of in ("cpu", "calls")}
    for name, points in pooled.items():
        spread = []
        for r in rounds:  # what one round says, at the middle budget: cost times squared error, which no budget changes
            mine, theirs = r[OURS][1], r[name][1]
            spread.append(theirs["cpu"] * theirs["error"] ** 2 / (mine["cpu"] * mine["error"] ** 2))
        row: dict[str, Any] = {"points": points}
        for of in ("cpu", "calls"):
            cost = at_error(points, of)
            row[f"{of}_at_error"] = cost
            row[f"{of}_over_ours"] = cost / base[of] if cost and base[of] else None
        table[name] = row | {"efficiency_over_ours": sorted(round(s, 2) for s in spread)}
    return table


def main() -> None:
    """Measure, print, and record where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    methods, missing = [], []
    for name in METHODS:
        try:
            __import__(name.split()[0]) if name.split()[0] in ("captum", "shap") else None
            methods.append(name)
        except ImportError:
            missing.append(name)
    with tempfile.TemporaryDirectory() as folder:
        reward_model(folder)
        scorers = {shared: ClassifierReward(folder, share_prompt=shared) for shared in (True, False)}
        measure(scorers, 99, methods)  # imports and warm-up
        rounds = [measure(scorers, number, methods) for number in range(RESPONSES)]
    table = summary(rounds)
    for name, row in table.items():
        errors = ", ".join(f"{p['error']:.3f} ({p['cpu']:.2f} s, {p['calls']:.0f} calls)" for p in row["points"])
        print(f"{name:<36} {errors}   {row['cpu_over_ours']} x ours, rounds {row['efficiency_over_ours']}")
    if args.record:
        notes = ["CPU seconds of the process, on a machine that was busy; methods took turns on each response"]
        notes += [f"not installed: {', '.join(missing)}"] if missing else []
        settings = {"players": P, "prompt": PROMPT, "responses": RESPONSES, "batch": BATCH, "error": ERROR}
        record("attribution", {"settings": settings, "methods": table}, notes)


if __name__ == "__main__":
    main()
