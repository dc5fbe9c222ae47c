"""What a piece of work cost this process. Standard library alone: peers import it too."""

from __future__ import annotations

import contextlib
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Meter:
    """Wall seconds, and CPU seconds of all threads (user and system), since it was made or read last."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Count from now."""
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def lap(self) -> dict[str, float]:
        """Seconds since the last lap, and start the next one.

        Returns:
            `wall_s` and `cpu_s`.
        """
        wall, cpu = self._wall, self._cpu
        self.restart()
        return {"wall_s": self._wall - wall, "cpu_s": self._cpu - cpu}


def cost_of(work: Callable[[], Any]) -> tuple[dict[str, float], Any]:
    """Do something once.

    Returns:
        Its `wall_s` and `cpu_s`, and in `rise_mib` how far memory rose above what was resident before; and its result.
    """
    before = _start_peak()
    meter = Meter()
    result = work()
    return {**meter.lap(), "rise_mib": peak_mib() - before}, result


def peak_mib() -> float:
    """Largest resident memory of this process so far, in MiB.

    Where Linux tells it by process image (`VmHWM`), that is taken: the figure of `getrusage` also knows the memory of
    the process that started this one.
    """
    from_image = _status("VmHWM")
    if from_image is not None:
        return from_image
    unit = 2**20 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def _start_peak() -> float:
    """Let the peak begin at what is resident now, where the system can do that; returns that, or the peak so far."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    resident = _status("VmRSS")
    return peak_mib() if resident is None else resident


def _status(field: str) -> float | None:
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{field}:")), None)
