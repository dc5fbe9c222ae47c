"""The figure of docs/regimes/irl.md: rounds in which both levels are solved, on six arms, for several temperatures.

python -m benchmarks.irl_rounds docs/regimes/irl-rounds.svg
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure

ROUNDS = 12
COLOURS = {0.4: "#c8694f", 0.5: "#e0a458", 0.6: "#9bbf85", 1.0: "#4f8f5b", 2.0: "#4f7fb8"}


def gaps(beta: float, reference: str) -> list[float]:
    """Divergence from the expert after each round, with the Bradley-Terry optimum `log(expert / policy)` as reward."""
    draws = torch.randn((2, 6), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expert, first = draws.log_softmax(1)
    policies = [first]
    for _ in range(ROUNDS):
        reward = expert - policies[-1]
        held_to = policies[-1] if reference == "previous" else first
        policies.append((held_to + reward / beta).log_softmax(0))
    return [float((expert.exp() * (expert - policy)).sum()) for policy in policies]


def main(path: Path) -> None:
    """Draw.

    Args:
        path: of the SVG.
    """
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for panel, reference in zip(panels, ("previous", "initial"), strict=True):
        for beta, colour in COLOURS.items():
            values = [max(value, 1e-7) for value in gaps(beta, reference)]
            panel.plot(values, marker="o", markersize=3, color=colour, label=f"$\\beta$ = {beta:g}")
        panel.set_yscale("log")
        panel.set_ylim(5e-8, 1e5)
        panel.set_xlabel("round")
        panel.set_title(f"kl_reference: {reference}", fontsize=10)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("nats from the expert to the policy")
    figure.legend(*panels[0].get_legend_handles_labels(), fontsize=9, loc="outside right center", frameon=False)
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
