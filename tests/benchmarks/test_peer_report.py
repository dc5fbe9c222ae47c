"""Tables come from the newest file of each benchmark, and from nothing else."""

from __future__ import annotations

import json

import pytest

from benchmarks import report, sft_training
from benchmarks.chat_samples import TINY
from benchmarks.rounds import Case, Runs, compare

PAGE = "before\n<!-- head_loss_peers -->\nold\n<!-- end -->\nafter\n"


def write(folder, name, result, date="2026-11-25"):
    facts = {"date": date, "versions": {"torch": "2.13.0"}, "machine": {"cores": 2}, "notes": ["shared"]}
    (folder / f"{date}-{name}.json").write_text(json.dumps({**facts, "result": {"threads": 2, **result}}))


def head_loss_result():
    cases = [Case("materialised", "all", "m"), Case("lit_reason", "one pass", "m"), Case("trl", "chunks", "m", True)]
    figures = {
        "materialised": [{"cpu_s": 4.0, "wall_s": 2.0, "rise_mib": 1000.0}] * 2,
        "lit_reason": [
            {"cpu_s": 1.0, "wall_s": 1.0, "rise_mib": 200.0},
            {"cpu_s": 2.0, "wall_s": 1.0, "rise_mib": 100.0},
        ],
        "trl": [None, None],
    }
    runs = Runs(figures, {"trl": "no environment"})
    return {"cases": compare(runs, cases, "materialised", ["cpu_s", "wall_s", "rise_mib"])}


def test_a_block_is_filled_from_the_newest_file(tmp_path):
    write(tmp_path, "head_loss_peers", {"cases": {}}, date="2026-11-24")
    write(tmp_path, "head_loss_peers", head_loss_result())
    page = report.fill(PAGE, tmp_path)
    assert page.startswith("before\n<!-- head_loss_peers -->\n`2026-11-25-head_loss_peers.json`, 2 cores")
    assert page.endswith("<!-- end -->\nafter\n") and "old" not in page
    assert (
        "| lit_reason: one pass | 1.5 | 0.38 (0.25 to 0.50) | 1 | 0.50 (0.50 to 0.50) | 150 | 0.15 (0.10 to 0.20) |"
        in page
    )
    assert "| trl | did not run: no environment |" in page
    assert report.fill(page, tmp_path) == page


def test_without_a_file_the_block_says_so(tmp_path):
    assert "Not recorded yet" in report.fill(PAGE, tmp_path)


def test_the_training_table_has_every_case(tmp_path):
    def half(seconds, **more):
        return {"steps": [{"wall_s": seconds, "cpu_s": seconds}] * 4, "peak_mib": 100.0, "losses": [1.0], **more}

    runs = Runs({case.name: [half(2.0), half(2.0)] for case in sft_training.CASES})
    runs.figures["lit_reason"] = [half(1.0, floor_s=2.0), half(1.0, floor_s=2.0)]
    runs.figures["trl grouped"] = [None, None]
    write(tmp_path, "sft_training", {"cases": sft_training.summarise(runs, TINY["vocab_size"])})
    page = report.fill("<!-- sft_training -->\n<!-- end -->\n", tmp_path)
    assert "| hf padded: transformers.Trainer, padded to the longest row | 16,304 | " in page
    assert "2.00 (2.00 to 2.00)" in page and "take 2.00 times what" in page
    assert "| trl grouped | did not run" in page


@pytest.mark.parametrize("name", report.TABLES)
def test_the_page_has_a_block_for_every_table(name):
    assert f"<!-- {name} -->" in "".join(page.read_text() for page in report.PAGES)
