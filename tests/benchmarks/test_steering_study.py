"""The arithmetic of the steering study: strengths matched, cells topped up, methods compared at equal perplexity."""

from __future__ import annotations

import json

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from benchmarks.steering_report import Comparison, Units, levelled, sums
from benchmarks.steering_study import joined, matched_strength, plan, strength_of
from benchmarks.steering_tasks import PER_CLASS, Task


def units(share: float, nll: float) -> Units:
    """Eight prompts of ten tokens each, all alike."""
    return Units(np.full(8, share), np.full(8, 10 * nll), np.full(8, 10.0))


@pytest.mark.parametrize("limit", [14.0, 20.0, 45.0])
def test_a_perplexity_that_grows_exponentially_is_met_exactly(limit):
    points = [(x, 10 * np.exp(4 * x)) for x in (0.35, 0.15, 0.25)]
    assert matched_strength(points, limit) == pytest.approx(np.log(limit / 10) / 4)


def test_the_limit_is_twice_what_no_direction_gives():
    rows = [
        {"kind": "tune", "prompts": "topics", "target": None, "method": "none", "perplexity": 10.0, "strength": 0.0}
    ]
    rows += [{**rows[0], "target": "food", "method": "mean", "strength": x, "perplexity": 10 * 2 ** (5 * x)}
             for x in (0.1, 0.3)]  # fmt: skip
    rows += [{**rows[1], "method": "caa", "perplexity": 99.0}, {**rows[1], "prompts": "style", "perplexity": 99.0}]
    assert strength_of(dict(enumerate(rows)), "food", "mean") == pytest.approx(0.2)


def test_methods_on_one_line_are_equal_at_equal_perplexity():
    everywhere = np.arange(8)
    bare, near, far = units(0.2, 2.0), units(0.3, 2.5), units(0.4, 3.0)
    assert levelled(bare, far, near, everywhere) == pytest.approx(0)
    assert levelled(bare, near, far, everywhere) == pytest.approx(0)
    better = units(0.6, 3.0)  # on its line, 0.4 at 2.5 nats
    assert levelled(bare, better, near, everywhere) == pytest.approx(0.1)


def cell(**fields) -> dict:
    given = {"kind": "test", "seed": 0, "target": None, "method": "none", "prompts": "topics", "strengths": {}}
    given |= {"each": 2, "by_prompt": {"topics": [[1, 1, 0, 0], [0, 2, 0, 0]]}, "judge_accuracy": {"topics": 0.5}}
    given |= {"ended": [0, 1], "tokens": [40, 30], "nll": [80.0, 60.0], "texts": ["a b", "b c", "c d", "d e"]}
    return {**given, **fields}


def test_topping_up_adds_counts_and_keeps_texts():
    whole = joined(cell(), cell(by_prompt={"topics": [[2, 0, 0, 0], [2, 0, 0, 0]]}, ended=[2, 0], texts=["e f"]))
    assert whole["by_prompt"]["topics"] == [[3, 1, 0, 0], [2, 2, 0, 0]] and whole["ended"] == [2, 1]
    assert whole["tokens"] == [80, 60] and whole["nll"] == [160.0, 120.0]
    assert whole["texts"] == ["a b", "b c", "c d", "d e", "e f"]


def test_tables_count_the_wanted_class_and_compare_the_same_prompts():
    steered = cell(target="food", method="confident", strengths={"food": 0.2}, nll=[120.0, 90.0],
                   by_prompt={"topics": [[2, 0, 0, 0], [1, 1, 0, 0]]})  # fmt: skip
    control = {**steered, "method": "same_count", "by_prompt": {"topics": [[1, 1, 0, 0], [1, 1, 0, 0]]}}
    tests = Comparison([cell(), steered, control, cell(prompts="style")], "food")
    shown = {row["method"]: row for row in tests.table()}
    assert shown["none"]["success"]["value"] == 0.25 and shown["confident"]["success"]["value"] == 0.75
    assert shown["none"]["perplexity"] == pytest.approx(np.exp(2)) and shown["none"]["texts"] == 4
    gaps = {row["against"]: row for row in tests.differences()}
    assert gaps["none"]["as run"]["value"] == 0.5 and "at equal perplexity" not in gaps["none"]
    assert gaps["same_count"]["as run"]["value"] == gaps["same_count"]["at equal perplexity"]["value"] == 0.25


def test_sums_stand_beside_each_direction_alone_and_none():
    kinds = [cell(kind="sum", target=target, method="confident") for target in ("food+sports", "food", "sports")]
    rows = sums([cell(), *kinds])
    assert [row["added"] for row in rows] == ["nothing", "food", "sports", "food+sports"]
    assert all(row["food"]["value"] == 0.25 and row["sports"]["value"] == 0 for row in rows)


def test_judge_and_directions_never_share_a_text_and_answers_to_one_question_stay_together():
    texts = {name: [f"{name} {i}" for i in range(100)] for name in ("concise", "verbose")}
    task = Task("style", texts, True, [], [], 30, 20, {})
    mine, judge = task.split(4)
    assert not {text for text, _ in mine} & {text for text, _ in judge}
    pairs = [(mine[i][0].split()[1], mine[PER_CLASS + i][0].split()[1]) for i in range(PER_CLASS)]
    assert all(a == b for a, b in pairs) and [k for _, k in mine] == [0] * PER_CLASS + [1] * PER_CLASS
    assert mine != task.split(5)[0]


def test_every_test_of_the_plan_follows_the_tuning_of_its_method():
    tuned = set()
    for planned in map(dict, plan()):
        json.dumps(planned)
        if planned["kind"] == "tune":
            tuned.add((planned["target"], planned["method"]))
        elif planned["method"] != "none":
            assert all((target, planned["method"]) in tuned for target in planned["target"].split("+"))
