"""One way to record a measurement: what ran, when, with which versions, on which machine."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("lit-reason", "torch", "lightning", "transformers", "peft", "numpy", "accelerate", "triton")
PEERS = ("trl", "datasets", "liger-kernel", "cut-cross-entropy")


def machine() -> dict[str, Any]:
    """Processor, cores, memory and Python of this machine, and how many processes wanted to run in the last minutes."""
    names = [line.split(":", 1)[1].strip() for line in _cpuinfo() if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "load_15_minutes": round(os.getloadavg()[2], 1),
        "python": platform.python_version(),
        "system": platform.system(),
    }


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def versions(names: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Installed versions of the packages that decide a measurement.

    Args:
        names: packages to ask for; those not installed are left out.
    """
    found = {}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and largest of repeated measurements."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def record(name: str, result: dict[str, Any], notes: Sequence[str] = (), command: str | None = None) -> Path:
    """Write a result with its circumstances.

    Args:
        name: file name without date.
        result: figures, JSON-able.
        notes: what a reader must know, such as other load on the machine.
        command: what was run; default: the present module with its arguments.

    Returns:
        The file, `benchmarks/results/<date>-<name>.json`.
    """
    RESULTS.mkdir(exist_ok=True)
    today = datetime.date.today().isoformat()
    path = RESULTS / f"{today}-{name}.json"
    command = command or " ".join([Path(sys.executable).name, "-m", *_module(), *sys.argv[1:]])
    facts = {"date": today, "command": command, "versions": versions(), "machine": machine(), "notes": list(notes)}
    path.write_text(json.dumps({**facts, "result": result}, indent=1) + "\n")
    return path


def _module() -> list[str]:
    spec = sys.modules["__main__"].__spec__
    return [spec.name] if spec is not None else [sys.argv[0]]


if __name__ == "__main__":
    print(json.dumps(versions(PACKAGES + PEERS)))  # asked of the peers' environment by benchmarks.rounds
