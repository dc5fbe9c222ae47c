"""The tournament: its runs, what a kill costs, equal tokens, and what it refuses."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tiny_run import write_model, write_traces

from lit_reason.cli import tournament, tournament_cell
from lit_reason.cli.door import main as door
from lit_reason.core.metrics_log import read_metrics
from lit_reason.errors import UserError

CALLBACKS = [
    {"class_path": "Throughput"},
    {"class_path": "VerifiedGeneration", "init_args": {"limit": 4, "sampling": {"max_new_tokens": 3}}},
    {"class_path": "HFExport"},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A recipe on a tiny model and tiny traces, and a study of it."""
    made = tmp_path_factory.mktemp("study")
    write_model(made / "model")
    write_traces(made / "traces.jsonl", rows=40)
    recipe = {
        "seed_everything": 0,
        "model": {
            "class_path": "SFTRegime",
            "init_args": {
                "lm": {"path": str(made / "model")},
                "optim": {"lr": 3e-3, "schedule": "constant"},
            },
        },
        "data": {
            "class_path": "TraceData",
            "init_args": {
                "train_file": str(made / "traces.jsonl"),
                "predict_file": str(made / "traces.jsonl"),
                "condense": {"min_tokens": 0, "min_chars": 1},
                "batch_rows": 8,
                "max_length": 128,
            },
        },
        "trainer": {
            "accelerator": "cpu",
            "max_epochs": 1,
            "log_every_n_steps": 1,
            "enable_checkpointing": False,
            "callbacks": CALLBACKS,
        },
    }
    (made / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    study = {
        "recipe": str(made / "recipe.yaml"),
        "reference": "full",
        "arms": {
            "full": {},
            "epic": {"options": {"data.condense.strategy": "epic"}},
            "staged": {
                "stages": [{"share": 0.4, "options": {"data.condense.strategy": "head"}}, {"share": 0.6}],
                "budgets": ["epochs"],
            },
        },
        "seeds": [0, 1],
        "budgets": ["epochs", "tokens"],
        "columns": {"loss": "train/loss"},
        "threads": 1,
    }
    (made / "study.yaml").write_text(yaml.safe_dump(study))
    return made


@pytest.fixture(scope="module")
def outcome(folder):
    """The whole study, once."""
    out = folder / "out"
    assert door(["tournament", "--config", str(folder / "study.yaml"), "--out", str(out)]) == 0
    return out, json.loads((out / "results.json").read_text())


def test_every_run_is_there_once(outcome):
    out, found = outcome
    ran = {(c["budget"], c["arm"], c["seed"]) for c in found["cells"]}
    assert ran == {
        *(("epochs", arm, seed) for arm in ("full", "epic", "staged") for seed in (0, 1)),
        *(("tokens", "epic", seed) for seed in (0, 1)),
    }
    assert found["finished"] == "8 of 8 runs" and found["command"].startswith("lit-reason tournament --config")
    for name in ("results.csv", "results.md", "results.txt", "report.html"):
        assert (out / name).stat().st_size > 100


def test_equal_tokens_are_equal_to_within_half_a_step(outcome):
    cells = {(c["budget"], c["arm"], c["seed"]): c for c in outcome[1]["cells"]}
    for seed in (0, 1):
        reference, epochs, tokens = (
            cells[b, a, seed] for b, a in (("epochs", "full"), ("epochs", "epic"), ("tokens", "epic"))
        )
        assert epochs["trained_tokens"] < 0.8 * reference["trained_tokens"]
        largest_step = 8 * 40
        assert abs(tokens["trained_tokens"] - reference["trained_tokens"]) <= largest_step / 2
        assert tokens["steps"] > epochs["steps"] == reference["steps"] == 5


def test_a_stage_starts_from_what_the_one_before_left(outcome):
    out, found = outcome
    first, second = (out / "runs/task/epochs/staged/seed-0" / f"stage-{n}" for n in (0, 1))
    config = yaml.safe_load((second / "config.yaml").read_text())
    assert Path(config["model"]["init_args"]["lm"]["path"]) == first / "export"
    logs = [read_metrics(f / "metrics.csv") for f in (first, second)]
    assert [log.steps for log in logs] == [2, 3]  # 0.4 and 0.6 of five steps
    (cell,) = (c for c in found["cells"] if (c["arm"], c["seed"]) == ("staged", 0))
    assert cell["trained_tokens"] == sum(log.last("perf/total_trained_tokens") for log in logs)


def test_the_runs_are_those_of_fit_with_the_same_options(folder, outcome, tmp_path):
    options = ["--seed_everything=1", "--data.seed=1", "--data.condense.strategy=epic"]
    logger = (
        f"--trainer.logger={{class_path: lightning.pytorch.loggers.CSVLogger, init_args: {{save_dir: {tmp_path}}}}}"
    )
    assert door(["fit", "--config", str(folder / "recipe.yaml"), *options, logger]) == 0
    alone = read_metrics(next(tmp_path.rglob("metrics.csv")))
    within = read_metrics(outcome[0] / "runs/task/epochs/epic/seed-1/metrics.csv")
    assert alone.points("train/loss") == within.points("train/loss") != []


def test_finished_runs_are_not_repeated_and_changed_ones_are(folder, outcome, monkeypatch, tmp_path):
    out, before = outcome
    study = yaml.safe_load((folder / "study.yaml").read_text())
    trained = []
    real = tournament_cell.run_fit
    monkeypatch.setattr(tournament_cell, "run_fit", lambda *a, **k: (trained.append(a[2]), real(*a, **k))[1])
    again = list(tournament.run(tournament.load(folder / "study.yaml"), out))
    assert trained == [] and [r.trained_tokens for r in again] == [c["trained_tokens"] for c in before["cells"]]
    study |= {"seeds": [0], "budgets": ["epochs"]}
    del study["arms"]["staged"]
    study["arms"]["epic"]["options"]["data.condense.tau"] = 0.7
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    changed = list(tournament.run(tournament.load(tmp_path / "study.yaml"), out))
    assert len(trained) == 1 and "epic" in trained[0]
    assert changed[1].trained_tokens > before["cells"][1]["trained_tokens"]


@pytest.mark.parametrize("checkpoints", [False, True])
def test_killed_it_goes_on(folder, outcome, tmp_path, checkpoints):
    """A real kill within the second run: the first is kept, the second ends as if nothing had happened."""
    study = yaml.safe_load((folder / "study.yaml").read_text()) | {"seeds": [1], "budgets": ["epochs"]}
    del study["arms"]["staged"]
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    if checkpoints:
        recipe["trainer"]["enable_checkpointing"] = True
        saver = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": {"every_n_train_steps": 1}}
        recipe["trainer"]["callbacks"] = [*CALLBACKS, saver]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study | {"recipe": str(tmp_path / "recipe.yaml")}))
    out = tmp_path / "out"
    code = (
        "import os, signal, sys\n"
        "from lightning.pytorch import Trainer\n"
        "from lit_reason.cli import door, tournament_cell\n"
        "from lit_reason.callbacks.throughput import Throughput\n"
        "inner = Throughput.on_train_batch_start\n"
        "def step(self, trainer, *rest):\n"
        "    if trainer.global_step == 3 and 'epic' in trainer.log_dir:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    inner(self, trainer, *rest)\n"
        "Throughput.on_train_batch_start = step\n"
        "door.main(sys.argv[1:])\n"
    )
    command = ["tournament", "--config", str(tmp_path / "study.yaml"), "--out", str(out)]
    killed = subprocess.run([sys.executable, "-c", code, *command], capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    cell = out / "runs/task/epochs"
    first = (cell / "full/seed-1/result.json").read_text()
    assert not (cell / "epic/seed-1/result.json").exists() and (cell / "epic/seed-1").is_dir()
    assert json.loads((out / "results.json").read_text())["finished"] == "1 of 2 runs"
    assert door(command) == 0
    assert (cell / "full/seed-1/result.json").read_text() == first
    assert json.loads((out / "results.json").read_text())["finished"] == "2 of 2 runs"
    whole = read_metrics(outcome[0] / "runs/task/epochs/epic/seed-1/metrics.csv")
    resumed = read_metrics(cell / "epic/seed-1/metrics.csv")
    assert resumed.points("train/loss") == whole.points("train/loss")
    assert resumed.last("perf/total_trained_tokens") == whole.last("perf/total_trained_tokens")


@pytest.mark.slow
def test_two_workers_train_the_same(folder, outcome, tmp_path):
    study = yaml.safe_load((folder / "study.yaml").read_text()) | {"seeds": [0], "budgets": ["epochs"]}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    found = list(tournament.run(tournament.load(tmp_path / "study.yaml"), tmp_path / "out", workers=2))
    before = {c["arm"]: c for c in outcome[1]["cells"] if (c["seed"], c["budget"]) == (0, "epochs")}
    assert {r.arm: r.figures["train/loss"] for r in found} == {a: c["figures"]["train/loss"] for a, c in before.items()}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"arms": {"full": {"options": {"data.condense.strategi": "epic"}}}}, "arm 'full' on task 'task'"),
        ({"arms": {"full": {"options": {"data.condense.strategy": "epik"}}}}, "epik"),
        ({"recipe": "nowhere.yaml"}, "nowhere"),
        ({"tasks": {"t": {"problems": {"kind": "chian", "rows": 8, "held_out": 2}}}}, "did you mean 'chain'"),
        (
            {"tasks": {"t": {"problems": {"kind": "chain", "rows": 8, "held_out": 2, "settings": {"link": 2}}}}},
            "'links'",
        ),
    ],
)
def test_what_is_refused_before_anything_is_trained(folder, tmp_path, change, words, capsys):
    study = yaml.safe_load((folder / "study.yaml").read_text()) | {"budgets": ["epochs"]} | change
    for arm in study["arms"].values():
        arm.pop("budgets", None)
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    out = tmp_path / "out"
    assert door(["tournament", "--config", str(tmp_path / "study.yaml"), "--out", str(out)]) == 2
    assert words in capsys.readouterr().err
    assert not out.exists()


def test_what_a_recipe_must_have(folder, tmp_path):
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    recipe["trainer"]["callbacks"] = CALLBACKS[1:2]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    study = yaml.safe_load((folder / "study.yaml").read_text()) | {
        "recipe": str(tmp_path / "recipe.yaml"),
        "seeds": [0],
    }
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    with pytest.raises(UserError, match="HFExport"):
        tournament.check(tournament.load(tmp_path / "study.yaml"), tmp_path / "out")
    del study["arms"]["staged"]
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    with pytest.raises(UserError, match="Throughput"):
        list(tournament.run(tournament.load(tmp_path / "study.yaml"), tmp_path / "out"))
