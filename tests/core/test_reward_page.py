"""The page's part on a learned reward: every alarm has its sign, and a healthy run has none."""

from __future__ import annotations

import re

import pytest
import torch

from lit_reason.core.metrics_log import MetricsLog, read_metrics
from lit_reason.core.reward_page import reward_alarms, reward_section
from lit_reason.core.run_page import RunFacts, run_page
from lit_reason.regimes.irl.watch import contraction, correlation, endings, falling, style

HEALTHY = {
    "train/pair_accuracy": [0.6, 0.8],
    "val/pair_accuracy": [0.58, 0.62],
    "val/pair_accuracy_low": [0.5, 0.54],
    "val/pair_accuracy_high": [0.66, 0.7],
    "train/length_accuracy": [0.6, 0.6],
    "train/length_correlation": [0.1, 0.2],
    "train/end_share": [0.1, 0.2],
    "train/identical": [0.0, 0.01],
    "train/drift": [0.2],
    "train/kl_previous": [1.0],
    "train/kl_initial": [0.0, 1.0],
    "train/reward_std": [0.5, 0.6],
}


def log_of(tmp_path, **changes) -> MetricsLog:
    """A run's metrics; double underscores in names stand for slashes."""
    series = HEALTHY | {name.replace("__", "/"): values for name, values in changes.items()}
    late = {"train/drift", "train/kl_previous"}
    lines = ["step," + ",".join(series)]
    for step in range(2):
        cells = []
        for name, values in series.items():
            at = step - (name in late)
            cells.append(str(values[at]) if 0 <= at < len(values) else "")
        lines.append(f"{step}," + ",".join(cells))
    path = tmp_path / "metrics.csv"
    path.write_text("\n".join(lines) + "\n")
    return read_metrics(path)


def test_a_healthy_reward_raises_no_alarm_and_has_its_plots(tmp_path):
    log = log_of(tmp_path)
    assert reward_alarms(log) == []
    section = reward_section(log)
    assert [figure.title for figure in section.figures][:2] == ["Pairs told apart", "Signs of style"]
    (table,) = section.tables
    assert ("drift", None, "0.2") in table.rows and ("reward_std", "0.5", "0.6") in table.rows


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train__pair_accuracy": [0.6, 0.97], "val__pair_accuracy": [0.5, 0.51]}, "97%.*learnt style"),
        (
            {
                "train__pair_accuracy": [0.6, 0.97],
                "val__pair_accuracy__easy": [0.9, 0.9],
                "val__pair_accuracy__sums": [0.5, 0.5],
            },
            "97%.*held-out ones of the kind 'sums' \\(50%\\): it learnt style",
        ),
        ({"val__pair_accuracy": [0.7, 0.6]}, "fell from 70% to 60%"),
        ({"train__length_accuracy": [0.6, 0.95], "train__length_correlation": [0.1, -0.8]}, "Length alone tells 95%"),
        ({"train__end_share": [0.1, 0.7]}, "70% of the margin goes with the end token"),
        ({"train__ended_reward": [0.5, -9.0], "train__endless_reward": [-1.0, -1.0]}, "end earn -9.0 .* do -1.0"),
        ({"train__identical": [0.0, 0.4]}, "40% of the answers equal"),
        ({"train__drift": [1.6]}, "moved by 1.6 deviations"),
        ({"train__kl_previous": [33.0], "train__kl_initial": [0.0, 34.0]}, "33.0 nats .*34.0 from its start"),
    ],
)
def test_each_alarm_says_what_is_wrong_and_what_to_try(tmp_path, changes, words):
    log = log_of(tmp_path, **changes)
    (alarm,) = reward_alarms(log)
    assert re.search(words, alarm) and re.search(r"(Set|Lower|Bring|Give|Sample) ", alarm)
    page = run_page(RunFacts("run"), log)
    assert alarm in page.alarm and any(section.title == "Learned reward" for section in page.sections)


def test_kinds_of_held_out_pairs_have_curves_of_their_own(tmp_path):
    changes = {"val__pair_accuracy__easy": [0.9, 0.9], "val__pair_accuracy__sums": [0.6, 0.6]}
    kinds, one = (reward_section(log_of(tmp_path, **c)).figures[0].legend for c in (changes, {}))
    assert [name for name, *_ in kinds if "held-out" in name] == ["held-out pairs: easy", "held-out pairs: sums"]
    assert [name for name, *_ in one if "held-out" in name] == ["held-out pairs"]


def test_other_runs_have_no_such_section(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("step,train/loss\n0,1.0\n")
    assert reward_section(read_metrics(path)).empty and reward_alarms(read_metrics(path)) == []


def test_figures_of_style_in_closed_form():
    tokens = torch.tensor([[5, 1], [4, 1], [3, 1], [1, 3]])
    found = style(torch.tensor([4.0, 3.0, 2.0, -2.0]), tokens, torch.tensor([1.0, 0.0, -1.0, -5.0]))
    assert found["length_correlation"] == pytest.approx(1.0)  # the margin is the gap itself
    assert found["length_accuracy"] == pytest.approx(0.75)
    assert found["end_share"] == pytest.approx(3.0 / 1.75)
    shorter = style(torch.tensor([1.0, 1.0]), torch.tensor([[1, 2], [1, 3]]), torch.tensor([1.0, 1.0]))
    assert (shorter["length_accuracy"], shorter["end_share"]) == (1.0, 0.0)
    assert correlation(torch.tensor([1.0, 1.0]), torch.tensor([1.0, 2.0])) == 0.0
    assert endings([1.0, 5.0, -4.0], [True, False, True], -1.0) == {"ended_reward": -1.5, "endless_reward": -1.0}
    assert endings([1.0], [False], -1.0) == {} == endings([1.0], [True], None)
    assert contraction(0.5) == 1.0 and contraction(1.0) == 0.0 and contraction(0.05) == pytest.approx(19.0)
    assert falling([0.8, 0.9, 0.84], 0.05) and not falling([0.8, 0.9, 0.86], 0.05) and not falling([], 0.0)
