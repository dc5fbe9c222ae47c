"""The table of the low-rank study: which runs count, and its intervals."""

from __future__ import annotations

import json
import math

import pytest

from benchmarks.lowrank_study import Study, lines, table


def line(arm, lr, seed, perplexity, **more):
    figures = {"parameters": 10, "weight_bytes": 40, "optimizer_bytes": 80, "gradient_bytes": 40}
    figures |= {"peak_rss_bytes": 1, "cpu_seconds": 4.0, "seconds": 10.0, "restarts": 0, "restart_seconds": 0.0}
    return {"arm": arm, "lr": lr, "seed": seed, "perplexity": perplexity, **figures, **more}


RUNS = [
    *(line("lowrank", lr, 0, p) for lr, p in ((1e-3, 40.0), (2e-3, 30.0), (4e-3, 50.0))),
    *(line("lowrank", 2e-3, seed, p) for seed, p in ((1, 20.0), (2, 25.0), (3, 40.0))),
    line("lowrank", 1e-3, 1, 1.0),  # not the best rate: does not count
    *(line("lowrank+both", 2e-3, seed, p / 2) for seed, p in ((0, 30.0), (1, 20.0), (2, 25.0), (3, 40.0))),
    line("lowrank+both", 1e-3, 0, 16.0, restarts=4, restart_seconds=0.5),
    line("galore", 5e-3, 0, 12.0),
    {"arm": "galore", "lr": 1e-2, "seed": 0, "failed": 1},
]


@pytest.fixture
def rows(tmp_path):
    (tmp_path / "runs.jsonl").write_text("".join(json.dumps(run) + "\n" for run in RUNS))
    return table(Study({}, [], tmp_path, 0.0))


def test_the_seed_that_chose_the_rate_is_not_in_the_interval(rows):
    found = rows["lowrank"]
    assert found["lr"] == 2e-3 and found["bracketed"] and found["sweep"][2e-3] == 30.0
    assert found["perplexity"] == pytest.approx(20_000 ** (1 / 3))
    logs = [math.log(p) for p in (20.0, 25.0, 40.0)]
    mean = sum(logs) / 3
    half = 4.303 * math.sqrt(sum((x - mean) ** 2 for x in logs) / 2 / 3)
    assert found["interval"] == pytest.approx([math.exp(mean - half), math.exp(mean + half)])
    assert found["against_lowrank"] is None


def test_differences_are_paired_by_seed(rows):
    found = rows["lowrank+both"]
    assert found["against_lowrank"] == pytest.approx(-0.5)
    assert found["against_interval"] == pytest.approx([-0.5, -0.5])
    assert not found["bracketed"]  # no higher rate was tried


def test_an_arm_without_other_seeds_has_no_interval_and_a_failed_run_no_say(rows):
    found = rows["galore"]
    assert (found["perplexity"], found["interval"], found["sweep"]) == (None, None, {5e-3: 12.0})
    shown = list(lines(rows, 100))
    assert shown[-1].startswith("| galore | 0.005 (not bracketed) | 12.0 | - | - | - | - | 0.00 |")
    assert "| 25 | - |" in shown[-1]
