"""C1 and C6 in a tiny size: all cases do the same work, and the sums over it are right."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks import loop_overhead, sft_training
from benchmarks.chat_samples import TINY, batches_of, chat_samples
from benchmarks.peers import sft_training as peers
from benchmarks.rounds import Runs


def test_samples_are_what_the_benchmark_says():
    samples = chat_samples(49152)
    lengths = np.array([len(s.ids) for s in samples])
    assert len(samples) == 64 and abs(lengths.mean() - 120) < 10 and lengths.max() <= 512
    trained = sum(len(s.ids) - s.prompt for s in samples)
    assert abs(trained / lengths.sum() - 0.4) < 0.005
    assert all(len(s.labels) == len(s.ids) and s.labels.count(-100) == s.prompt for s in samples)
    assert chat_samples(49152) == samples
    by_length = batches_of(samples, by_length=True)
    assert [len(b) for b in by_length] == [8] * 8
    flat = [len(s.ids) for b in by_length for s in b]
    assert flat == sorted(lengths, reverse=True)
    assert sorted(i for half in sft_training.HALVES for i in half) == list(range(8))


def test_ours_and_the_padded_trainer_see_the_same_losses():
    batches = sft_training.work(TINY, [0, 7])
    ours = sft_training.train(TINY, batches, threads=1)
    theirs = peers.train("hf padded", TINY, batches, threads=1)
    assert len(ours["steps"]) == len(theirs["steps"]) == 2
    assert len(ours["losses"]) == 3
    assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-5)
    assert len(set(ours["losses"])) == 3
    assert 0 < ours["floor_s"] < sum(step["wall_s"] for step in ours["steps"])


@pytest.mark.parametrize("case", ["trl padded", "trl padding-free"])
def test_trl_sees_the_same_losses(case):
    pytest.importorskip("trl")
    batches = sft_training.work(TINY, [0])
    assert peers.train(case, TINY, batches, 1)["losses"] == pytest.approx(
        sft_training.train(TINY, batches, 1)["losses"], rel=1e-5
    )


def test_the_summary_divides_tokens_by_seconds_over_all_batches():
    def half(seconds, mib, losses=(2.0, 1.0)):
        return {"steps": [{"wall_s": s, "cpu_s": 2 * s} for s in seconds], "peak_mib": mib, "losses": list(losses)}

    runs = Runs({case.name: [None, None] for case in sft_training.CASES})
    ours = [half([1, 1, 1, 1], 100), half([1, 1, 1, 1], 300)]
    runs.figures["lit_reason"] = [{**figures, "floor_s": 1.25} for figures in ours]
    runs.figures["hf padded"] = [half([2, 2, 2, 2], 400), half([4, 4, 4, 4], 400, (2.0, 1.25))]
    runs.failures = {"trl padded": "why"}
    result = sft_training.summarise(runs, TINY["vocab_size"])
    hf = result["hf padded"]
    trained = sum(len(s.ids) - s.prompt for s in chat_samples(TINY["vocab_size"]))
    assert hf["trained_tokens_per_wall_s"] == pytest.approx(trained / 24)
    assert hf["speedup_of_lit_reason_wall_s"] == pytest.approx(3.0)
    assert hf["speedup_by_batch_cpu_s"] == pytest.approx({"median": 3.0, "min": 2.0, "max": 4.0})
    assert result["lit_reason"]["of_floor"] == pytest.approx(8 / 2.5) and "of_floor" not in hf
    assert hf["memory_of_lit_reason"] == pytest.approx(0.5)
    assert hf["largest_loss_difference"] == pytest.approx(0.2)
    assert result["trl padded"]["failed"] == "why"


def test_the_trainer_trains_as_a_bare_loop_does():
    result = loop_overhead.measure(TINY, rounds=2, steps=2)
    assert result["ReasonTrainer"]["largest_loss_difference"] < 1e-6
    assert result["bare loop, plain transformers"]["largest_loss_difference"] < 1e-5
    for row in result.values():
        assert row["cpu_s"]["min"] > 0
    assert result[loop_overhead.BASE][f"ratio to {loop_overhead.BASE}"]["cpu_s"] == {"median": 1, "min": 1, "max": 1}
