"""All measurements of this machine, one after the other, and their tables in the docs: `make bench`."""

from __future__ import annotations

import subprocess
import sys

SCRIPTS = (
    "benchmarks.sft_training",  # C1
    "benchmarks.head_loss",  # C2
    "benchmarks.head_family",
    "benchmarks.operators",
    "benchmarks.policy_update",  # C3
    "benchmarks.rollouts",  # C4
    "benchmarks.grpo_steps",
    "benchmarks.lowrank_step",  # C5
    "benchmarks.loop_overhead",  # C6
    "benchmarks.refactorization",
    "benchmarks.plan_memory",
)

if __name__ == "__main__":
    for script in (*SCRIPTS, "benchmarks.report"):
        print(f"== {script}", flush=True)
        subprocess.run([sys.executable, "-m", script], check=True)
