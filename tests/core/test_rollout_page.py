"""Rollouts on a run's page: which are shown, how they are cut and coloured, and that their words stay words."""

from __future__ import annotations

import dataclasses

import pytest
from html_page import Page

from lit_reason.core import rollout_page
from lit_reason.core.metrics_log import MetricsLog
from lit_reason.core.report import ReportData, render_report
from lit_reason.core.rollout_page import credit_section, newest_round, rollout_section
from lit_reason.rollout.trajectory import Trajectory, write_ledger

WORDS = {1: "<b>why</b> ", 2: "so ", 3: "</span><script>x</script> ", 4: "Error & more ", 5: "\x00"}


def words(ids):
    return "".join(WORDS[i] for i in ids)


def rollout(prompt=0, number=0, outcome=0.0, credit=(0.5, -1.0), version=3, **fields):
    values = {
        "prompt": prompt,
        "rollout": number,
        "ids": [1, 1, 2, 3, 4, 2],
        "turn_id": [-1, -1, 0, 0, -1, 1],
        "logprob": [0.0, 0.0, -1.0, -1.0, 0.0, -1.0],
        "turn_terms": [{"tool": 0.25, "none": 0.0}, {}],
        "outcome_terms": {"exact": outcome},
        "stops": ["</tool>", "length"],
        "finished": True,
        "policy_version": version,
        "row_id": f"task {prompt}",
        "advantage": [0.0, 0.0, credit[0], credit[0], 0.0, credit[1]],
    }
    return Trajectory(**values | fields)


@pytest.fixture
def ledger(tmp_path):
    path = tmp_path / "rollouts.jsonl"
    write_ledger(path, [rollout(version=0)])
    round_ = [rollout(p, g, outcome=float(p * g)) for p in range(3) for g in range(3)]
    write_ledger(path, [*round_, rollout(9, failure="gone"), dataclasses.replace(rollout(8), ids=[], turn_id=[])])
    return path


def test_the_newest_round_alone_and_of_it_what_was_played(ledger):
    found = newest_round(ledger)
    assert [(t.prompt, t.rollout) for t in found] == [(p, g) for p in range(3) for g in range(3)]
    assert {t.policy_version for t in found} == {3}
    assert newest_round(ledger.parent / "none.jsonl") == []


def test_of_a_large_ledger_the_end_is_read(ledger, monkeypatch):
    lines = ledger.read_text().splitlines(keepends=True)
    monkeypatch.setattr(rollout_page, "MOST_READ", sum(map(len, lines[-4:])) + 5)  # and a piece of the line before
    assert [(t.prompt, t.rollout) for t in newest_round(ledger)] == [(2, 1), (2, 2)]


def test_the_best_and_the_worst_of_the_tasks_that_differ_most(ledger):
    shown = rollout_section(ledger, words, most=4).passages
    assert [p.title for p in shown] == [
        "task 2, rollout 2",
        "task 2, rollout 0",
        "task 1, rollout 2",
        "task 1, rollout 0",
    ]
    assert shown[0].facts == ["reward 4.25", "exact 4", "3 tokens sampled"]


def test_every_token_stands_in_one_piece_and_turns_have_the_colour_of_their_credit(ledger):
    section = rollout_section(ledger, words)
    pieces = section.passages[0].pieces
    assert "".join(p.text for p in pieces) == words([1, 1, 2, 3, 4, 2])
    assert [p.label for p in pieces] == [
        "prompt · 2",
        "turn 1 · 2 · credit +0.50 · tool 0.25",
        "environment · 1",
        "turn 2 · 1 · credit -1.00",
    ]
    assert [(p.colour, p.strength, p.faint) for p in pieces] == [
        ("muted", None, True),
        ("above", 0.5, False),
        ("muted", None, True),
        ("below", 1.0, False),
    ]
    assert (section.scale.low, section.scale.high) == ("-1.00", "+1.00")


def test_a_round_without_credit_is_shown_without_colour(tmp_path):
    write_ledger(tmp_path / "x.jsonl", [rollout(advantage=[])])
    (passage,) = rollout_section(tmp_path / "x.jsonl", words).passages
    assert {p.strength for p in passage.pieces if not p.faint} == {0.0}


def test_what_the_model_writes_is_text_on_the_page(ledger, tmp_path):
    section = rollout_section(ledger, words)
    page = Page(render_report(ReportData("run", sections=[section])))
    assert "</span><script>x</script> " in "".join(page.texts) and "<b>why</b>" in "".join(page.texts)
    styles = [a["style"] for tag, a in page.tags if tag == "span" and "scaled" in a.get("class", "")]
    assert len(styles) == 12 and styles[0].startswith("--c:var(--above);--s:")
    assert "-1.00" in page.texts and "+1.00" in page.texts  # the legend


def test_credit_over_time_has_a_plot_for_each_figure():
    series = {
        name: [(step, 0.1 * step) for step in range(5)]
        for name in (
            *("train/reward", "train/dead_groups", "credit/variance_turn_1", "credit/variance_turn_2"),
            *("credit/gradient_turn_1", "credit/gradient_turn_2"),
        )
    }
    figures = {f.title: [label for label, *_ in f.legend] for f in credit_section(MetricsLog(series)).figures}
    assert figures == {
        "Reward of a rollout": ["all"],
        "Variance of the advantage": ["turn 1", "turn 2"],
        "Share of the gradient": ["turn 1", "turn 2"],
        "Groups that teach nothing": ["without spread"],
    }


def test_rewards_by_name_have_a_plot_where_there_are_several():
    def plots(names):
        series = {f"train/paid/{name}": [(0, 0.1), (1, size)] for name, size in names.items()}
        return {
            f.title: (sorted(label for label, *_ in f.legend), f.note)
            for f in credit_section(MetricsLog(series)).figures
        }

    assert plots({"alone": 1.0}) == {}
    assert plots({"b": 1.0, "a": -2.0})["Rewards by name"][0] == ["a", "b"]
    shown, note = plots({f"r{n}": float(n) for n in range(10)})["Rewards by name"]
    assert shown == [f"r{n}" for n in range(2, 10)] and note.startswith("2 smaller ones")
