"""Planned against measured memory: steps of a LLaMA of 60 M parameters, 1,024 tokens, float32.

Each measurement is a process. Measured is the largest resident size (VmHWM) during the second step, minus the
resident size before the model was built. The C library keeps freed blocks below a threshold for itself; `returned`
lowers that threshold (MALLOC_MMAP_THRESHOLD_), so that what is freed leaves the process and the figure is that of the
tensors; `default` leaves it.

    python -m benchmarks.plan_memory [--threads 1]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.lowrank_step import LENGTH, RANK, SHAPE
from benchmarks.meter import peak_mib
from benchmarks.record import record

ROWS = 4
CASES = ("low-rank", "full", "sltrain", "galore")
MALLOC = {"default": {}, "returned": {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}}


def resident_mib() -> float:
    """Resident size of this process now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def run_case(case: str, threads: int) -> dict[str, float]:
    """Plan, then two real steps in this process.

    Returns:
        `planned_mib` and `measured_mib`.
    """
    import torch

    from lit_reason.core.config import OptimConfig, SubspaceConfig
    from lit_reason.core.memory_trace import trace_step
    from lit_reason.core.optim import build_optimizer
    from lit_reason.models.config import LowRankConfig, ModelConfig
    from lit_reason.models.language_model import LanguageModel
    from lit_reason.regimes.sft.regime import SFTRegime

    torch.set_num_threads(threads)
    lowrank = LowRankConfig(rank=RANK, sparse_density=0.03 if case == "sltrain" else 0.0)
    model = ModelConfig(config=SHAPE, dtype="float32", lowrank=lowrank if case in ("low-rank", "sltrain") else None)
    name: Any = "galore" if case == "galore" else "adamw"
    regime: Any = SFTRegime(model, OptimConfig(optimizer=name, lr=1e-3, subspace=SubspaceConfig(rank=RANK)))
    with torch.device("meta"):
        regime.lm = LanguageModel.load(model)
    planned = trace_step(regime, [LENGTH] * ROWS).peak / 2**20
    before = resident_mib()
    regime.lm = LanguageModel.load(model)
    optimizer = build_optimizer(regime, regime.optim_config)
    positions = torch.arange(LENGTH).repeat(ROWS)
    rows = torch.arange(LENGTH * ROWS)[positions < LENGTH - 1]
    boundaries = torch.arange(0, LENGTH * ROWS + 1, LENGTH, dtype=torch.int32)
    for step in range(2):
        if step == 1:
            Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        ids = torch.randint(SHAPE["vocab_size"], (LENGTH * ROWS,))
        weights = torch.full((len(rows),), 1 / len(rows))
        regime.lm(ids, positions, boundaries, rows, ids[rows + 1], weights).loss_sum.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {"planned_mib": planned, "measured_mib": peak_mib() - before}


def main() -> None:
    """Measure all cases, print the table; write the file after each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(run_case(options.case, options.threads)))
        return
    result: dict[str, Any] = {}
    print(f"{'':12}{'planned MiB':>12}" + "".join(f"{name:>14}{'ratio':>8}" for name in MALLOC))
    for case in CASES:
        row: dict[str, Any] = {}
        for name, settings in MALLOC.items():
            command = [sys.executable, "-m", "benchmarks.plan_memory", "--case", case]
            environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads), **settings}
            done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
            found = json.loads(done.stdout.strip().splitlines()[-1])
            row["planned_mib"] = found["planned_mib"]
            row[name] = {"measured_mib": found["measured_mib"], "ratio": found["measured_mib"] / found["planned_mib"]}
        result[case] = row
        shown = "".join(f"{row[name]['measured_mib']:14.0f}{row[name]['ratio']:8.3f}" for name in MALLOC)
        print(f"{case:12}{row['planned_mib']:12.0f}{shown}", flush=True)
        path = record("plan_memory", {"threads": options.threads, "cases": result})
    print(path)


if __name__ == "__main__":
    main()
