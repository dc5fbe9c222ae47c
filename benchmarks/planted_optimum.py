"""How far from a planted optimum the search for shaping weights ends, beside random points at the same budget.

    python -m benchmarks.planted_optimum [--record]

The objective is `1 - 4 |w - w0|^2` on the simplex, observed with noise of standard deviation 0.05; 20 trials, 5 of them
initial. The regret is that of the point the search chooses: by posterior mean, and for random points by observation.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import torch

from benchmarks.record import record
from lit_reason.regimes.shaping.config import SearchConfig
from lit_reason.regimes.shaping.simplex import sobol_points
from lit_reason.regimes.shaping.trials import Trial, next_trial

NOISE, TRIALS, SEEDS = 0.05, 20, 8
EXPLAINERS = ("final", "uniform", "shap", "lime")


def regret(seed: int, K: int, propose: Any) -> float:
    """True regret of one search's choice."""
    g = torch.Generator().manual_seed(seed)
    optimum = sobol_points(8, K, 100 + seed)[seed]
    config = SearchConfig(trials=TRIALS, initial=5, reruns=0, propose=propose, seed=seed)
    trials: list[Trial] = []
    while True:
        chosen = next_trial(trials, config, EXPLAINERS[:K])
        assert chosen is not None
        kind, w = chosen
        loss = float(4 * ((w - optimum) ** 2).sum())
        if kind == "final":
            return loss
        value = 1 - loss + NOISE * float(torch.randn((), generator=g))
        trials.append(Trial(len(trials), kind, tuple(w.tolist()), "finished", value, NOISE**2))


def main() -> None:
    """Search, print, and record where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = {}
    for K in (3, 4):
        for propose in ("bayes", "random"):
            found = [regret(seed, K, propose) for seed in range(SEEDS)]
            rows[f"{K} weights, {propose}"] = {
                "regrets": found,
                "median": statistics.median(found),
                "worst": max(found),
            }
            print(f"{K} weights, {propose}: {[round(r, 4) for r in found]}", flush=True)
    if args.record:
        record("planted_optimum", {"noise": NOISE, "trials": TRIALS, "searches": rows})


if __name__ == "__main__":
    main()
