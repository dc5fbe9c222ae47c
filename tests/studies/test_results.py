"""The table's arithmetic against figures worked out by hand."""

import csv
import io
from dataclasses import replace

import pytest

from lit_reason.core.metrics_log import MetricsLog
from lit_reason.core.report import render_report
from lit_reason.studies.page import study_page, write_outcome
from lit_reason.studies.plan import Cell, read_study
from lit_reason.studies.results import CellResult, gather, read_result, rows
from lit_reason.studies.table import comma_separated, markdown, text

STUDY = read_study(
    {
        "recipe": "demo/student",
        "arms": {"half": {"series": "cut", "at": 0.5}, "full": {}, "none": {}},
        "reference": "full",
        "tasks": {"easy": {"at": 0}, "hard": {"at": 1}},
        "seeds": [0, 1],
        "budgets": ["epochs", "tokens"],
        "columns": {"length": "val/generated_tokens", "seam": "train/loss_seam"},
        "axis": "tau",
        "task_axis": "hardness",
    },
    "s.yaml",
)


def result(task, budget, arm, seed, score, low, high, tokens, cpu, **figures):
    figures = {"val/pass@1": score, "val/pass@1_low": low, "val/pass@1_high": high, **figures}
    return CellResult(task, budget, arm, seed, "k", figures, 10, tokens, 2 * tokens, 3 * cpu, cpu, ((10, score),))


RESULTS = [
    result("easy", "epochs", "full", 0, 0.9, 0.85, 0.95, 1000, 10.0, **{"val/generated_tokens": 100.0}),
    result("easy", "epochs", "full", 1, 0.7, 0.60, 0.80, 3000, 30.0, **{"val/generated_tokens": 120.0}),
    result("easy", "epochs", "half", 0, 0.8, 0.75, 0.85, 500, 6.0, **{"train/loss_seam": 2.0}),
    result("easy", "epochs", "half", 1, 1.0, 0.98, 1.00, 1200, 9.0, **{"train/loss_seam": 1.0}),
    result("easy", "tokens", "half", 1, 0.5, 0.40, 0.60, 3001, 27.0),
]


@pytest.fixture
def table():
    return {(r.task, r.budget, r.arm): r for r in rows(STUDY, RESULTS)}


def test_only_finished_places_have_a_row_and_the_reference_stands_under_both_budgets(table):
    assert list(table) == [
        ("easy", "epochs", "half"),
        ("easy", "epochs", "full"),
        ("easy", "tokens", "half"),
        ("easy", "tokens", "full"),
    ]
    assert table["easy", "tokens", "full"].scores == table["easy", "epochs", "full"].scores == {0: 0.9, 1: 0.7}


def test_means_spread_envelope_and_gap(table):
    half = table["easy", "epochs", "half"]
    assert half.score == pytest.approx(0.9)
    assert half.spread == (0.8, 1.0) and half.envelope == (0.75, 1.0)
    assert half.gaps == pytest.approx({0: -0.1, 1: 0.3}) and half.gap == pytest.approx(0.1)
    full = table["easy", "epochs", "full"]
    assert full.gap is None and full.envelope == (0.6, 0.95)
    assert table["easy", "tokens", "half"].gap == pytest.approx(-0.2)  # against seed 1 alone, the one it has


def test_costs_are_means_and_ratios_are_taken_seed_by_seed(table):
    half = table["easy", "epochs", "half"]
    assert half.costs == {"trained_tokens": 850, "tokens": 1700, "seconds": 22.5, "cpu_seconds": 7.5}
    assert half.ratios["trained_tokens"] == pytest.approx((0.5 + 0.4) / 2)  # not 850 / 2000
    assert half.ratios["cpu_seconds"] == pytest.approx((0.6 + 0.3) / 2)
    assert table["easy", "tokens", "half"].ratios["trained_tokens"] == pytest.approx(3001 / 3000)


def test_columns_are_means_over_the_runs_that_have_them(table):
    assert table["easy", "epochs", "half"].columns == {"seam": 1.5}
    assert table["easy", "epochs", "full"].columns == {"length": 110.0}


def test_a_score_without_interval_or_cost(tmp_path):
    bare = CellResult("easy", "epochs", "full", 0, "k", {"val/pass@1": 0.5}, 10)
    (row,) = [r for r in rows(STUDY, [bare]) if r.budget == "epochs"]
    assert row.envelope is None and row.costs == {} == row.ratios
    assert "50.0" in markdown(STUDY, [row, replace(row, arm="half")])
    assert text(STUDY, [row]) == ""  # the reference alone compares nothing
    assert rows(STUDY, [CellResult("easy", "epochs", "full", 0, "k", {"val/loss": 0.5}, 10)]) == []


def test_text_and_markdown():
    lines = text(STUDY, rows(STUDY, RESULTS)).splitlines()
    assert lines[0] == "easy, equal epochs" and lines[1].split()[:3] == ["arm", "val/pass@1", "interval"]
    assert lines[2].split() == ("half 90.0 75.0 to 100.0 80.0 100.0 +10.0 850 0.45 7.5 0.45 1.5".split())
    assert lines[3].split() == "full 80.0 60.0 to 95.0 90.0 70.0 2,000 1.00 20.0 1.00 110".split()
    assert "| half | 50.0 | 40.0 to 60.0 | 50.0 | -20.0 | 3,001 | 1.00 | 27.0 | 0.90 |  |  |" in markdown(
        STUDY, rows(STUDY, RESULTS)
    )


def test_csv_holds_plain_numbers():
    (first, *_) = csv.DictReader(io.StringIO(comma_separated(rows(STUDY, RESULTS))))
    assert first["arm"] == "half" and float(first["score"]) == pytest.approx(0.9)
    assert (first["score_min"], first["low"], first["seeds"]) == ("0.8", "0.75", "2")
    assert float(first["cpu_seconds_ratio"]) == pytest.approx(0.45) and first["seam"] == "1.5"


def test_stages_add_up_and_training_figures_are_averaged():
    cost = {"perf/total_trained_tokens": [(3, 100.0)], "perf/total_cpu_seconds": [(3, 2.0)]}
    one = MetricsLog({**cost, "val/pass@1": [(4, 0.1)], "train/loss": [(3, 9.0)]})
    losses = [(step, float(step)) for step in range(8)]
    two = MetricsLog({**cost, "val/pass@1": [(4, 0.2), (8, 0.6)], "train/loss": losses})
    made = gather(Cell("easy", "epochs", "half", 0), "k", [one, two], "val/pass@1")
    assert (made.steps, made.trained_tokens, made.cpu_seconds, made.seconds) == (4 + 8, 200, 4.0, None)
    assert made.figures["val/pass@1"] == 0.6 and made.figures["train/loss"] == (3 + 4 + 5 + 6 + 7) / 5
    assert made.curve == ((4, 0.2), (8, 0.6))


def test_a_result_holds_for_its_settings_alone(tmp_path):
    made = gather(Cell("easy", "epochs", "half", 0), "k", [MetricsLog({"val/loss": [(1, 0.5)]})], "val/loss")
    path = tmp_path / "result.json"
    assert read_result(path, "k") is None
    made.write(path)
    again = read_result(path, "k")
    assert again is not None and (again.cell, again.figures, again.steps) == (made.cell, made.figures, made.steps)
    assert read_result(path, "other") is None


def test_the_page_shows_every_row_and_the_curves(tmp_path):
    page = render_report(study_page(STUDY, RESULTS, rows(STUDY, RESULTS), "lit-reason tournament"))
    for words in ("Easy, equal epochs", "Easy, equal tokens", "hardness", "tau", "trained tokens", "5 of 20 runs"):
        assert words in page, words
    assert "Hard" not in page and "<script" not in page
    assert page.count("<svg") == 2 + 2 + 4  # by hardness, by tau, by the two costs: each under two budgets


def test_what_is_left_on_disk(tmp_path):
    said = write_outcome(STUDY, RESULTS, tmp_path, command="c", page=False)
    assert {p.name for p in tmp_path.iterdir()} == {"results.json", "results.csv", "results.md", "results.txt"}
    assert (tmp_path / "results.txt").read_text() == said + "\n"
