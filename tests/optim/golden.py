"""Writes `golden.json`: what the published packages of GaLore and Fira make of some gradients.

Run once, in an environment with torch and the packages galore-torch 1.0 and fira 1.0.2 (both Apache-2.0):
`python tests/optim/golden.py`.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

STEPS, RANK, SCALE = 6, 3, 0.25
SHAPES = [(8, 5), (5, 8), (6, 6)]


def gradients(shape: tuple[int, int], step: int) -> torch.Tensor:
    """A gradient that no random generator has to reproduce: growing, so that Fira's limiter has work to do."""
    rows, columns = torch.arange(shape[0]).float()[:, None], torch.arange(shape[1]).float()[None]
    return (1 + step) * (torch.sin(3 * rows + columns * columns + step) + 0.3 * torch.cos(rows * columns - 2 * step))


def start(shape: tuple[int, int]) -> torch.Tensor:
    """The first weights."""
    return torch.linspace(-1, 1, shape[0] * shape[1]).reshape(shape)


def trajectory(build, shape: tuple[int, int]) -> list[float]:
    """The weights after all steps, row by row."""
    weight = torch.nn.Parameter(start(shape))
    optimizer = build(weight)
    for step in range(STEPS):
        weight.grad = gradients(shape, step)
        optimizer.step()
    return weight.detach().flatten().tolist()


def main() -> None:
    """Write the file."""
    from fira import FiraAdamW
    from galore_torch import GaLoreAdamW

    own = {"rank": RANK, "update_proj_gap": 200, "proj_type": "std"}
    plain = {"lr": 0.01, "eps": 1e-6, "no_deprecation_warning": True}
    builders = {
        "galore": lambda w: GaLoreAdamW([{"params": [w], **own, "scale": SCALE}], **plain),
        "fira": lambda w: FiraAdamW([{"params": [w], **own, "alpha": SCALE}], **plain),
    }
    found = {name: [trajectory(build, shape) for shape in SHAPES] for name, build in builders.items()}
    Path(__file__).with_name("golden.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
