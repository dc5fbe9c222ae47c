"""The arithmetic of the study on credit by turn: the sweep, and what its table says of runs that did not get there."""

import json
import math

import pytest

from benchmarks.turn_level_study import MOST_ROUNDS, RATES, Run, Study, lines, mean_rank, neighbours, ratio
from lit_reason.cli.reason_cli import build


def found(rounds, success=0.5):
    return {"rounds": rounds, "final": success, "success": [success], "tokens": None, "cpu_seconds": 1.0}


@pytest.mark.parametrize("best", [3e-4, 1e-3, 3e-3, 1e-2])
def test_the_sweep_ends_when_worse_rates_stand_on_either_side(best, tmp_path, monkeypatch):
    study, made = Study(tmp_path, math.inf), []

    def make(run):
        made.append(run)
        return found(round(10 + 20 * abs(math.log(run.lr / best))))

    monkeypatch.setattr(study, "make", make)
    study.complete("K=2", "traj_mr")
    assert [(r.lr, r.seed) for r in made[-5:]] == [(best, seed) for seed in range(5)]
    assert {lr for lr in (r.lr for r in made)} >= set(neighbours(best))
    assert neighbours(RATES[0]) == [RATES[1]]


def test_a_rate_that_gets_there_beats_one_that_does_not_and_else_success_decides():
    assert mean_rank([found(90)]) < mean_rank([found(None, 0.89)]) < mean_rank([found(None, 0.2)])


def test_the_table_counts_what_did_not_get_there_as_at_least_the_last_round(tmp_path):
    runs = {(3e-4, 100): None, (1e-3, 100): 30, (3e-3, 100): 50, (1e-3, 0): 20, (1e-3, 1): None}
    with (tmp_path / "runs.jsonl").open("w") as file:
        for rule, factor in (("traj_mr", 1), ("flat_content", 2)):
            for (lr, seed), rounds in runs.items():
                run = {"task": "K=2", "rule": rule, "lr": lr, "seed": seed}
                file.write(json.dumps({"run": run, **found(rounds and rounds * factor)}) + "\n")
    rows = list(Study(tmp_path, 0.0).rows())
    assert [(r["lr"], r["reached"], r["rounds"]) for r in rows] == [
        (1e-3, 1, {0: 20, 1: MOST_ROUNDS[2]}), (1e-3, 1, {0: 40, 1: MOST_ROUNDS[2]})]  # fmt: skip
    table = list(lines(rows))
    assert "| 1/2 | >= 60 |" in table[2] and "| >= 7,680 |" in table[2] and "| 1/2 | >= 70 |" in table[3]


def test_ratios_are_taken_seed_by_seed():
    assert ratio({0: 10, 1: 40, 2: 7}, {0: 20, 1: 80}) == "0.50 (0.50 to 0.50)"
    assert ratio({0: 10}, {1: 3}) == "-"


@pytest.mark.parametrize("rule", ["turn_rtg", "gae"])
def test_the_options_of_a_run_are_a_recipes(rule, tmp_path):
    from benchmarks.turn_level_study import options_of

    built = build("fit", options_of(Run("K=6 chained", rule, 1e-3, 7), tmp_path))
    env = built.datamodule.env()
    assert (env.rungs, env.chained, env.pays["coin"], built.model.dialogue.max_turns) == (6, True, 1.0, 6)
    assert built.model.optim_config.lr == 1e-3 and built.trainer.max_steps == 150
