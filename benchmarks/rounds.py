"""Cases in processes of their own, in alternating order, each compared with one of them.

This process imports no torch, so that what it starts begins small.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.record import spread

ROOT = Path(__file__).parents[1]
PEERS = ROOT / ".venv-peers" / "bin" / "python"


@dataclass(frozen=True)
class Case:
    """One way to do the work.

    Attributes:
        name: what its module knows it by.
        what: in words.
        module: run as `python -m module --case name ...`; its last line of output is a JSON object of figures.
        peer: runs in the peers' environment instead of this one.
    """

    name: str
    what: str
    module: str
    peer: bool = False


@dataclass
class Runs:
    """What came of some rounds.

    Attributes:
        figures: by case, one entry a round, None where it failed.
        failures: why a case gave no figures, by case.
    """

    figures: dict[str, list[dict[str, Any] | None]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    def values(self, case: str, key: str) -> list[float]:
        """One figure of all rounds that have it."""
        return [f[key] for f in self.figures[case] if f is not None]

    def ratios(self, case: str, base: str, key: str) -> list[float]:
        """One figure over that of the base, round by round."""
        pairs = zip(self.figures[case], self.figures[base], strict=True)
        return [a[key] / b[key] for a, b in pairs if a is not None and b is not None]


def case_arguments(cases: Sequence[Case], rounds: int, tiny: str = "model") -> argparse.ArgumentParser:
    """Arguments of a benchmark whose cases run in processes of their own: those of the whole, and of one case.

    Args:
        cases: all of them.
        rounds: how many by default.
        tiny: what `--tiny` makes tiny.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tiny", action="store_true", help=f"a tiny {tiny}, to try the script")
    parser.add_argument("--case", choices=[case.name for case in cases], help=argparse.SUPPRESS)
    return parser


def run_rounds(cases: Sequence[Case], rounds: int, arguments: Callable[[int], list[str]], threads: int) -> Runs:
    """Run every case once a round; every second round goes backwards.

    Args:
        cases: peers among them fail, with that reason, where their environment is missing.
        rounds: number of rounds.
        arguments: command-line arguments of a round, the same for all its cases.
        threads: threads of each process.
    """
    runs = Runs({case.name: [] for case in cases})
    for turn in range(rounds):
        order = list(cases) if turn % 2 == 0 else list(reversed(cases))
        for case in tqdm(order, desc=f"round {turn + 1} of {rounds}", leave=False):
            figures = _run(case, arguments(turn), threads)
            if isinstance(figures, str):
                runs.failures[case.name] = figures
                tqdm.write(f"{case.name}: {figures}")
            runs.figures[case.name].append(None if isinstance(figures, str) else figures)
    return runs


def _run(case: Case, arguments: list[str], threads: int) -> dict[str, Any] | str:
    """The figures of one process, or why there are none."""
    if case.peer and not PEERS.exists():
        return "there is no .venv-peers; `make bench` builds it"
    python = str(PEERS) if case.peer else sys.executable
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    command = [python, "-m", case.module, "--case", case.name, "--threads", str(threads), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        return lines[-1] if lines else f"ended with code {done.returncode}"
    return json.loads(done.stdout.strip().splitlines()[-1])


def peer_versions() -> dict[str, str]:
    """Versions in the peers' environment; empty where there is none."""
    if not PEERS.exists():
        return {}
    done = subprocess.run([PEERS, "-m", "benchmarks.record"], capture_output=True, text=True, cwd=ROOT, check=True)
    return json.loads(done.stdout)


def compare(runs: Runs, cases: Sequence[Case], base: str, keys: Sequence[str]) -> dict[str, Any]:
    """Print a table of medians and ratios, and return it.

    Args:
        runs: the rounds.
        cases: rows of the table.
        base: the case that the others are divided by.
        keys: figures to show.

    Returns:
        By case and figure: median, least and largest, of the figure and of its ratio to the base.
    """
    width = max(len(case.name) for case in cases) + 2
    print(f"{'':{width}}" + "".join(f"{key:>26}{'of ' + base:>26}" for key in keys))
    result: dict[str, Any] = {}
    for case in cases:
        if not runs.values(case.name, keys[0]):
            result[case.name] = {"what": case.what, "failed": runs.failures.get(case.name, "")}
            print(f"{case.name:{width}}{runs.failures.get(case.name, '')}")
            continue
        row: dict[str, Any] = {"what": case.what}
        shown = ""
        for key in keys:
            figure, ratios = spread(runs.values(case.name, key)), runs.ratios(case.name, base, key)
            row[key] = figure
            shown += f"{span(figure):>26}"
            if ratios:
                row[f"{key}_ratio"] = spread(ratios)
                shown += f"{span(row[f'{key}_ratio']):>26}"
        result[case.name] = row
        print(f"{case.name:{width}}{shown}")
    return result


def span(figure: dict[str, float]) -> str:
    """Median (least to largest), short."""
    median, low, high = (f"{figure[k]:.3g}" for k in ("median", "min", "max"))
    return f"{median} ({low} to {high})"
