"""Refactorization by QR and a small SVD against the SVD of the whole product, and a restart at 1B shapes.

Factors in float32 with column scales over two decades. The full SVD is what the code of arXiv 2505.22922 runs.

    python -m benchmarks.refactorization [--rounds 3] [--threads 1]
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.meter import Meter, peak_mib
from benchmarks.record import record, spread
from lit_reason.kernels.refactorization import refactorize
from lit_reason.models.lowrank import LowRankLinear
from lit_reason.strategies.refactorization import refactorize_layers

SHAPES = {  # sides and rank, and for which model of the literature
    "60M attention": (512, 512, 128),
    "60M MLP": (1376, 512, 128),
    "130M MLP": (2048, 768, 256),
    "350M MLP": (2736, 1024, 256),
    "1B attention": (2048, 2048, 512),
    "1B MLP": (5461, 2048, 512),
}
SLOW = 2048 * 5461  # a full SVD of so many entries is run once


def factors(m: int, n: int, r: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random factors out of balance."""
    return torch.randn(m, r) * torch.logspace(0, 2, r), torch.randn(n, r) / n


def full_svd(b: torch.Tensor, a: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same factors from the SVD of the whole product."""
    u, s, vh = torch.linalg.svd(b @ a.t(), full_matrices=False)
    rank = b.shape[1]
    return u[:, :rank] * s[:rank].sqrt(), vh[:rank].t() * s[:rank].sqrt()


def measure(m: int, n: int, r: int, rounds: int) -> dict[str, Any]:
    """CPU seconds of both ways and the relative error of the product, over some rounds."""
    seconds: dict[str, list[float]] = {"core": [], "full": []}
    error: dict[str, list[float]] = {"core": [], "full": []}
    for turn in range(rounds):
        b, a = factors(m, n, r)
        product = b.double() @ a.double().t()
        for name, way in (("core", refactorize), ("full", full_svd)):
            if name == "full" and turn and m * n >= SLOW:
                continue
            meter = Meter()
            new_b, new_a = way(b, a)
            seconds[name].append(meter.lap()["cpu_s"])
            gap = (new_b.double() @ new_a.double().t() - product).norm() / product.norm()
            error[name].append(float(gap))
    ratio = spread(seconds["full"])["median"] / spread(seconds["core"])["median"]
    return {
        "cpu_s": {k: spread(v) for k, v in seconds.items()},
        "times_faster": ratio,
        "error": {k: max(v) for k, v in error.items()},
    }


def restart_1b() -> dict[str, float]:
    """All 168 matrices of the 1B model, 24 layers of rank 512, on one process."""
    layers = []
    for _ in range(24):
        for m, n in [(2048, 2048)] * 4 + [(5461, 2048)] * 2 + [(2048, 5461)]:
            layer = LowRankLinear(n, m, 512, 1.0, 0, None, False, torch.empty(0))
            layer.draw(False)
            layers.append(layer)
    held = sum(p.numel() * p.element_size() for layer in layers for p in layer.parameters())
    before, meter = peak_mib(), Meter()
    found = refactorize_layers(layers)
    return {**meter.lap(), "matrices": len(found), "factors_mib": held / 2**20, "extra_peak_mib": peak_mib() - before}


def main() -> None:
    """Measure, print a table, write the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    refactorize(*factors(64, 64, 8))  # loads the libraries
    whole = restart_1b()
    seconds, more = (whole[key] for key in ("cpu_s", "extra_peak_mib"))
    print(f"restart of the 1B model: {seconds:.1f} CPU s, {more:.0f} MiB more")
    shapes = {name: measure(*sides, options.rounds) for name, sides in tqdm(SHAPES.items())}
    for name, row in shapes.items():
        core, full = (f"{row['cpu_s'][k]['median']:8.3f} s (error {row['error'][k]:.1e})" for k in ("core", "full"))
        print(f"{name:16}{core}{full} {row['times_faster']:6.1f}x")
    result = {
        "threads": options.threads,
        "shapes": {name: {"m_n_r": SHAPES[name], **row} for name, row in shapes.items()},
        "restart_1b": whole,
    }
    print(record("refactorization", result, ["CPU seconds of this process; the machine ran other work too"]))


if __name__ == "__main__":
    main()
