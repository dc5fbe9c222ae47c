"""Rounds alternate, pair their figures, and say why a case gave none."""

from __future__ import annotations

import time

import torch

from benchmarks import rounds
from benchmarks.meter import Meter, peak_mib
from benchmarks.rounds import Case, Runs, compare, run_rounds

CASES = [Case(name, "", "tests.benchmarks.echo_case") for name in "abc"]


def test_every_second_round_goes_backwards_and_a_failure_keeps_the_pairs_together(tmp_path):
    log = tmp_path / "log"
    runs = run_rounds(CASES, 2, lambda turn: ["--turn", str(turn), "--log", str(log)], threads=1)
    assert log.read_text().split() == ["0a", "0b", "0c", "1c", "1b", "1a"]
    assert runs.values("a", "s") == [1.0, 2.0]
    assert runs.values("b", "s") == [2.0]
    assert runs.failures == {"b": "b has had enough"}
    assert runs.ratios("b", "a", "s") == [2.0]
    assert runs.ratios("c", "a", "s") == [5.0, 5.0]


def test_a_figure_is_divided_by_that_of_its_own_round():
    runs = Runs({"a": [{"s": 1.0}, None, {"s": 4.0}], "b": [None, {"s": 9.0}, {"s": 2.0}]})
    assert runs.ratios("b", "a", "s") == [0.5]


def test_a_peer_without_its_environment_is_left_out_with_the_reason(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(rounds, "PEERS", tmp_path / "nothing")
    case = Case("p", "a peer", "tests.benchmarks.echo_case", peer=True)
    runs = run_rounds([case], 2, lambda turn: [], threads=1)
    assert "make bench" in runs.failures["p"]
    assert compare(runs, [case], "p", ["s"])["p"]["failed"] == runs.failures["p"]
    assert rounds.peer_versions() == {}


def test_the_meter_tells_working_from_waiting_and_starts_again_at_each_lap():
    meter = Meter()
    time.sleep(0.2)
    slept = meter.lap()
    assert slept["wall_s"] >= 0.2 > 0.1 > slept["cpu_s"]
    assert meter.lap()["wall_s"] < 0.2


def test_peak_memory_keeps_what_was_freed():
    big = torch.ones(2**26)
    high = peak_mib()
    assert high >= 256  # MiB, of which the tensor alone has as many
    del big
    assert peak_mib() > high - 8  # the kernel counts in batches of pages
