"""A measuring session on a GPU: cases under a time budget, results on disk after each, times and peak memory.

With `--cpu` every case runs once in a tiny size, so that a script cannot fail on a GPU for a typo.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.record import PACKAGES, PEERS, RESULTS, machine, versions

WARM_UP_S, MEASURE_S = 0.02, 0.1
Call = Callable[[], Any]


def arguments(description: str, budget_s: float) -> argparse.Namespace:
    """Parse the arguments of a script.

    Args:
        description: first line of its help.
        budget_s: its time budget in seconds.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--budget-s", type=float, default=budget_s, help="cases that no longer fit are left out")
    parser.add_argument(
        "--cpu", action="store_true", help="a tiny size on a CPU, to try the script; nothing to compare"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result file")
    return parser.parse_args()


class Session:
    """Runs cases and keeps the result file up to date.

    Args:
        name: of the script; the file is `<date>-gpu-<name>.json`.
        options: of `arguments`.
    """

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        if not options.cpu and not torch.cuda.is_available():
            raise SystemExit("there is no CUDA device; --cpu runs a tiny size")
        self.tiny = options.cpu
        self.device = torch.device("cpu" if options.cpu else "cuda")
        self.dtype = torch.float32 if options.cpu else torch.bfloat16
        self._began, self._budget_s = time.perf_counter(), options.budget_s
        self.cases: dict[str, dict[str, Any]] = {}
        self.failed: list[str] = []
        today = datetime.date.today().isoformat()
        options.results.mkdir(parents=True, exist_ok=True)
        self.path = options.results / f"{today}-gpu-{name}{'-tiny' if options.cpu else ''}.json"
        tiny = " --cpu" if options.cpu else ""
        self._facts = {
            "date": today,
            "command": f"python -m benchmarks.gpu.{name} --budget-s {options.budget_s:g}{tiny}",
            "device": "cpu" if options.cpu else torch.cuda.get_device_name(),
            "versions": versions(PACKAGES + PEERS),
            "machine": machine(),
        }

    @property
    def left_s(self) -> float:
        """Seconds left of the budget."""
        return self._budget_s - (time.perf_counter() - self._began)

    def case(self, key: str, work: Callable[[], dict[str, Any]], *, needs_s: float = 5.0, peer: bool = False) -> None:
        """Run a case, print a line, and write the file.

        A case that fails is written down with its reason, and the others still run: what is not installed or does not
        fit into memory must not cost the session. `close` then ends the script with an error, unless only peers failed.

        Args:
            key: name of the case.
            work: returns figures.
            needs_s: seconds it takes; with fewer left it is left out.
            peer: another library's, which may be missing.
        """
        if self.left_s < needs_s:
            self.cases[key] = {"left_out": f"{self.left_s:.0f} s left, {needs_s:.0f} s needed"}
        else:
            start = time.perf_counter()
            try:
                self.cases[key] = work()
            except Exception as error:  # noqa: BLE001  # written down, and an error at the end
                lines = str(error).strip().splitlines() or [""]
                self.cases[key] = {"failed": f"{type(error).__name__}: {lines[0]}"}
                if not peer:
                    self.failed.append(key)
            self.cases[key]["case_s"] = round(time.perf_counter() - start, 2)
        self._release()
        print(f"{key:44}{_line(self.cases[key])}", flush=True)
        self.path.write_text(json.dumps({**self._facts, "cases": self.cases}, indent=1) + "\n")

    def close(self) -> None:
        """Say where the results are.

        Raises:
            SystemExit: one of our own cases failed.
        """
        print(self.path)
        if self.failed:
            raise SystemExit(f"failed: {', '.join(self.failed)}")

    def time(self, calls: Sequence[Call]) -> dict[str, float]:
        """Milliseconds of a call, in turn on several inputs so that caches hold none of them.

        Args:
            calls: the same work on different inputs.

        Returns:
            Median, least and largest in milliseconds, and how many were timed.
        """
        if self.tiny:
            return _spread([_wall_ms(call) for call in calls])
        for warm in range(2):  # the first round compiles
            end = time.perf_counter() + WARM_UP_S * warm
            for call in calls:
                call()
            torch.cuda.synchronize()
            while time.perf_counter() < end:
                calls[0]()
                torch.cuda.synchronize()
        times: list[float] = []
        while sum(times) < MEASURE_S * 1e3 or len(times) < 2 * len(calls) + 1:
            times.append(_event_ms(calls[len(times) % len(calls)]))
        return _spread(times)

    def extra_gib(self, call: Call) -> float:
        """GiB of device memory that a call holds at its peak above what was allocated before; 0 on a CPU."""
        if self.tiny:
            call()
            return 0.0
        self._release()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**30

    def measure(self, calls: Sequence[Call]) -> dict[str, float]:
        """`time`, and `extra_gib` of the first call."""
        extra = self.extra_gib(calls[0])
        return {**self.time(calls), "extra_gib": extra}

    def ceilings(self) -> dict[str, float]:
        """What this device can do at most: copying, and products of square matrices of random numbers.

        Returns:
            `copy_gb_s` (read and written bytes, 10^9 a second) and `matmul_tflops`.
        """
        bytes_copied, side = (2**16, 64) if self.tiny else (8 * 10**9, 8192)
        copied, product = self.time([self._copy(bytes_copied)])["ms"], self.time([self._product(side)])["ms"]
        return {"copy_gb_s": 2 * bytes_copied / copied / 1e6, "matmul_tflops": 2 * side**3 / product / 1e9}

    def _copy(self, size: int) -> Call:
        source = torch.randint(0, 127, (size,), dtype=torch.int8, device=self.device)
        target = torch.empty_like(source)
        return lambda: target.copy_(source)

    def _product(self, side: int) -> Call:
        a, b = (torch.randn(side, side, device=self.device, dtype=self.dtype) for _ in range(2))
        return lambda: torch.mm(a, b)

    def _release(self) -> None:
        if not self.tiny:
            gc.collect()
            torch.cuda.empty_cache()


def _event_ms(call: Call) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def _wall_ms(call: Call) -> float:
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


def _spread(times: list[float]) -> dict[str, float]:
    return {"ms": statistics.median(times), "min_ms": min(times), "max_ms": max(times), "repeats": len(times)}


def _line(figures: dict[str, Any]) -> str:
    return "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in figures.items())
