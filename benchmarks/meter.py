"""What a piece of work cost this process. Standard library alone: peers import it too."""

from __future__ import annotations

import resource
import sys
import time
from pathlib import Path


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


def peak_mib() -> float:
    """Largest resident memory of this process so far, in MiB.

    Where Linux tells it by process image (`VmHWM`), that is taken: the figure of `getrusage` also knows the memory of
    the process that started this one.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    unit = 2**20 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
