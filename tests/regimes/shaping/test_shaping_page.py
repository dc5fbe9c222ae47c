"""The page of a search: trials, costs that add up, what the surrogate believes, tokens coloured by credit."""

from __future__ import annotations

import pytest
import torch

from lit_reason.core.report import ReportData, render_report
from lit_reason.regimes.shaping.page import credit_section, search_section
from lit_reason.regimes.shaping.trials import Trial
from lit_reason.rewards.attribution.attributor import Explanation
from lit_reason.rollout.trajectory import NOT_SAMPLED, Trajectory

FACTS = {"score": 2.0, "kl": 1.0, "length": 4.0, "seconds": 30.0, "evaluation_seconds": 2.0, "outer_seconds": 1.5,
         "reward_calls": 1000.0, "sampled_tokens": 200.0, "rounds": 4}  # fmt: skip
POINTS = {
    2: [(1, 0), (0, 1), (0.5, 0.5)],
    3: [(1, 0, 0), (0, 1, 0), (0.2, 0.3, 0.5)],
    4: [(1, 0, 0, 0), (0, 0.5, 0.5, 0)],
}


def trials(K):
    found = [Trial(n, "search", w, "finished", 1.0 + n, 0.04, (1.0,), FACTS) for n, w in enumerate(POINTS[K])]
    found.append(Trial(len(found), "search", POINTS[K][-1], "diverged", None, None, (), {"seconds": 8.0}))
    return [*found, Trial(len(found), "final", POINTS[K][-1], "finished", 5.0, 0.01, (1.0,), FACTS)]


def page(*sections):
    return render_report(ReportData("run", sections=sections))


@pytest.mark.parametrize("K", [2, 3, 4])
def test_trials_costs_and_belief(K):
    pytest.importorskip("botorch", reason="the extra shaping is not installed")
    names = ("final", "uniform", "shap", "lime")[:K]
    section = search_section(trials(K), names, surrogate=True)
    titles = [figure.title for figure in section.figures]
    assert titles[:2] == ["Weights by trial", "Objective by trial"]
    assert titles[2:] == {2: ["Posterior", "Acquisition"], 3: ["Posterior mean", "Acquisition"], 4: []}[K]
    table, costs = section.tables
    assert len(table.rows) == len(trials(K)) and [row[1] for row in table.rows].count("diverged") == 1
    searched = next(row for row in costs.rows if row[0] == "search")
    n = len(POINTS[K])
    assert searched[1] == n + 1 and searched[4] == f"{1000 * n:,}" and searched[5] == f"{200 * n:,}"
    text = page(section)
    assert "The final run has" in text and "diverged" in text and text.count("<svg") == len(titles)


def test_a_search_that_has_not_ended_a_trial_shows_nothing():
    assert search_section([Trial(0, "search", (1.0, 0.0))], ("final", "shap"), surrogate=True).empty


def answered(credit, ids=(5, 6, 7)):
    t = Trajectory(
        prompt=0, rollout=0, ids=[1, *ids], turn_id=[NOT_SAMPLED, 0, 0, 0], logprob=[0.0] * 4, turn_terms=[{}],
        outcome_terms={"score": 3.0}, stops=["end"], finished=True, policy_version=0, row_id="row-7",
    )  # fmt: skip
    return t, Explanation(torch.tensor(credit, dtype=torch.float64), 3.0, 0.0, 9)


def test_every_token_is_coloured_by_its_credit_under_each_explainer_and_the_mix():
    shown = [answered([[0.0, 0.0, 3.0], [4.0, -2.0, 1.0]]), answered([[0.0, 0.0, 3.0], [1.0, 1.0, 1.0]], (8, 8, 8))]
    section = credit_section([*shown, shown[0]], ("final", "shap"), (0.5, 0.5), lambda ids: f"<{ids[0]}>")
    assert [p.title for p in section.passages] == ["row-7: final", "shap", "mix"] * 2  # equal answers are shown once
    final, shap, mix = section.passages[:3]
    assert [piece.text for piece in shap.pieces] == ["<5>", "<6>", "<7>"]
    assert [piece.colour for piece in final.pieces] == ["muted", "muted", "above"]
    assert [piece.colour for piece in shap.pieces] == ["above", "below", "above"]
    assert [piece.strength for piece in shap.pieces] == [1.0, 0.5, 0.25]
    assert [piece.strength for piece in mix.pieces] == [0.5, 0.25, 0.5]
    assert section.scale.high == "+4" and section.scale.low == "-4"
    text = page(section)
    assert "&lt;5&gt;" in text and "<b></b>" not in text  # escaped, and no empty label before each token


def test_nothing_to_show_is_no_section():
    assert credit_section([], ("final",), (1.0,), str).empty
