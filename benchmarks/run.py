"""All measurements of this machine, one after the other: `make bench`."""

from __future__ import annotations

import subprocess
import sys

SCRIPTS = ("benchmarks.sft_training", "benchmarks.head_loss", "benchmarks.loop_overhead")

if __name__ == "__main__":
    for script in SCRIPTS:
        print(f"== {script}", flush=True)
        subprocess.run([sys.executable, "-m", script, *sys.argv[1:]], check=True)
