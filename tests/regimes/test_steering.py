"""The steering regime from end to end, on a student whose texts are of two kinds."""

from __future__ import annotations

import json
import re
from functools import partial

import numpy as np
import pytest
import torch

from lit_reason.cli import door
from lit_reason.cli.reason_cli import build
from lit_reason.core.metrics_log import read_metrics
from lit_reason.core.run_folder import run_folder
from lit_reason.errors import UserError
from lit_reason.regimes.steering.collection import Collection
from lit_reason.regimes.steering.config import TrialConfig
from lit_reason.regimes.steering.trial_run import check_trial
from lit_reason.steering.bank import Features
from lit_reason.steering.config import DirectionConfig
from lit_reason.steering.direction_file import read_directions
from lit_reason.tasks import chain
from lit_reason.tasks.problem_file import write_problems
from lit_reason.tasks.student import StudentConfig, write_student


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("steering")
    config = chain.ChainConfig()
    write_student(folder / "base", chain.words(config))
    write_problems(folder / "styles.jsonl", partial(chain.styled, config, 0), 120)
    return folder


@pytest.fixture(scope="module")
def misfits(folder):
    """What the files of the fit do not go with: a model of another width, other labels, a prompt's wrong mix."""
    write_student(folder / "narrow", chain.words(chain.ChainConfig()), StudentConfig(width=32))
    rows = [{"text": f"so {i}", "label": i % 2} for i in range(60)]
    (folder / "kinds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asks = [{"prompt": "so", "mix": {"direct": 1}}, {"prompt": "so", "mix": {"wanderin": 1}}]
    (folder / "asks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asks))


def arguments(folder, name, **settings):
    options = {
        "model": "SteeringRegime",
        "model.lm.path": folder / "base",
        "model.direction.segment": "mean",
        "data": "LabelledData",
        "data.history": folder / "styles.jsonl",
        "data.prompts": "[' decode', 'so first']",
        "trainer.accelerator": "cpu",
        "trainer.max_epochs": 1,
        "trainer.logger": "CSVLogger",
        "trainer.logger.save_dir": folder,
        "trainer.logger.name": name,
        "trainer.log_every_n_steps": 1,
        "trainer.enable_progress_bar": "false",
        "trainer.enable_model_summary": "false",
        "model.sampling.max_new_tokens": 5,
        "model.sampling.samples": 2,
    } | {key.replace("__", "."): value for key, value in settings.items()}
    return [f"--{key}={value}" for key, value in options.items() if value is not None]


def go(folder, verb="fit", name="run", **settings):
    cli = build(verb, arguments(folder, name, **settings))
    return cli, cli.run_verb()


@pytest.fixture(scope="module")
def fitted(folder):
    settings = {"model__steer__strength": 0.6, "model__gguf": "true", "model__direction__layers": "[1]"}
    cli, _ = go(folder, **settings)
    return cli, run_folder(cli.trainer)


@pytest.fixture(scope="module")
def file(fitted):
    return fitted[1] / "directions.safetensors"


def test_fit_writes_a_file_that_says_where_it_comes_from(fitted, file):
    cli, _ = fitted
    found, facts = read_directions(file), read_directions(file).facts
    assert list(found.vectors) == ["direct", "wandering"] and found.width == 64
    assert facts["method"] == "confident" and facts["centered"] is True and facts["folds"] == 5
    assert facts["model"]["id"] == str(cli.model.lm_config.path) and facts["model"]["model_type"] == "llama"
    assert sum(facts["texts"].values()) == len(cli.datamodule.parts["train"]) and facts["short_texts"] == 0
    assert facts["counts"]["direct"]["selected"] <= facts["counts"]["direct"]["total"] == facts["texts"]["direct"]
    assert len(facts["data_hash"]) == 24 and facts["split"] == {"holdout": 0.2, "judge_share": 0.3, "seed": 0}
    assert (facts["strength"], facts["unit"]) == (0.6, "residual_norm")


def test_fit_logs_what_the_probe_knows_in_and_out_of_sample(fitted):
    log = read_metrics(fitted[1] / "metrics.csv")
    assert log.last("train/probe_loss") < 0.3 < 0.69 < log.points("train/probe_loss")[0][1]
    assert log.last("val/probe_accuracy") > 0.9 and log.last("val/text_accuracy") > 0.9
    assert 0 <= log.last("val/probe_calibration_error") < 0.5 and 0 <= log.last("val/kept_direct") <= 1
    assert log.last("val/probe_loss") < 0.5 and log.last("val/loss") > 1
    assert {p.name for p in fitted[1].glob("*.gguf")} == {"direct.gguf", "wandering.gguf"}


def test_validate_reads_the_file_and_the_texts_as_its_fit_did(folder, file, fitted):
    cli, (figures,) = go(folder, "validate", "validate", model__file=file, model__direction__segment="token")
    log = read_metrics(fitted[1] / "metrics.csv")
    assert figures["val/probe_loss"] == pytest.approx(log.last("val/probe_loss"), rel=1e-4)


def test_a_checkpoint_serves_in_place_of_the_file(folder, fitted):
    """It knows classes, layers and segment: predict needs no history, and the recipe may say another segment."""
    (checkpoint,) = fitted[1].glob("checkpoints/*.ckpt")
    theirs = read_directions(fitted[1] / "directions.safetensors")
    steer = '{"mix": {"direct": 1.0}, "strength": 0.5}'
    for verb, settings in (
        ("validate", {"model__direction__segment": "token"}),
        ("predict", {"model__steer": steer, "data__history": None}),
    ):
        cli, _ = go(folder, verb, "ckpt", ckpt_path=checkpoint, **settings)
        ours = cli.model.directions
        assert ours.layer == theirs.layer and all(
            torch.equal(ours.vectors[n], theirs.vectors[n]) for n in theirs.vectors
        )
    with pytest.raises(UserError, match="give model.file, or ckpt_path"):
        go(folder, "validate", "none")
    with pytest.raises(UserError, match="features of other texts, .*what differs: split, pairs, layers"):
        go(folder, "fit", "ckpt", ckpt_path=checkpoint, data__seed=1, data__pair_field="label")


def test_test_tries_every_direction_and_writes_a_page(folder, file, capsys):
    cli, (figures,) = go(folder, "test", "test", model__file=file, model__trial__strengths="[0.5, 0.0]")
    trial = json.loads((run_folder(cli.trainer) / "steering.json").read_text())
    cells = {(c["target"], c["strength"]): c for c in trial["cells"]}
    assert list(cells) == [(None, 0.0), ("direct", 0.0), ("direct", 0.5), ("wandering", 0.0), ("wandering", 0.5)]
    off = cells[None, 0.0]
    for target in ("direct", "wandering"):
        assert cells[target, 0.0]["texts"] == off["texts"] != cells[target, 0.5]["texts"]
        assert cells[target, 0.0]["perplexity"] == off["perplexity"]
        assert figures[f"test/success_off_{target}"] == pytest.approx(off["judged"][target])
    assert all(sum(c["judged"].values()) == pytest.approx(1) and len(c["texts"]) == 4 for c in trial["cells"])
    for cell in trial["cells"]:
        assert cell["judged"]["direct"] == cell["verdicts"].count("direct") / 4
    assert trial["judge_accuracy"] > 0.9
    page = (run_folder(cli.trainer) / "steering.html").read_text()
    for part in ("Success against perplexity", "Where texts went", "Side by side", "judged as", "<svg"):
        assert part in page
    assert "steering.html" in capsys.readouterr().out


def test_predict_mixes_and_each_prompt_may_have_its_own(folder, file):
    rows = [
        {"prompt": " decode"},
        {"prompt": " decode", "mix": {"wandering": 2.0}},
        {"prompt": "so first", "mix": {"direct": 0}},
    ]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    mix = {"direct": 1.0, "wandering": -0.5}
    cli, _ = go(
        folder, "predict", "predict", model__file=file, data__prompts=folder / "prompts.jsonl",
        model__steer__mix=json.dumps(mix), data__history=None,
    )  # fmt: skip
    lines = [json.loads(line) for line in (run_folder(cli.trainer) / "predictions.jsonl").read_text().splitlines()]
    assert [(r["row_id"], r["sample"]) for r in lines] == [(f"prompts.jsonl:{i}", s) for i in (1, 2, 3) for s in (0, 1)]
    assert [r["mix"] for r in lines[::2]] == [mix, {"wandering": 2.0}, {"direct": 0.0}]
    assert all(r["strength"] == 0.6 and r["completion"] for r in lines)
    assert not any(layer._forward_hooks for layer in cli.model.lm.base.model.layers)


@pytest.mark.parametrize("method", ["same_count", "mean", "probe_weight", "random", "act_add"])
def test_every_method_stands_behind_the_same_switch(folder, method):
    extra = (
        {"model__direction__contrast": json.dumps({"direct": [" decode first", "so"]})} if method == "act_add" else {}
    )
    cli, _ = go(folder, "fit", method, model__direction__method=method, trainer__limit_val_batches=0, **extra)
    found = read_directions(run_folder(cli.trainer) / "directions.safetensors")
    assert found.facts["method"] == method
    assert list(found.vectors) == (["direct"] if method == "act_add" else ["direct", "wandering"])
    if method == "act_add":
        assert found.vectors["direct"].shape[0] > 1 and found.laid_from == 0


def test_texts_shorter_than_the_segment_are_counted_and_none_left_is_refused(folder):
    settings = {"model__direction__segment": "concat", "model__direction__length": 80, "trainer__limit_val_batches": 0}
    with pytest.raises(UserError, match="class 'direct' has no text that is long enough.*has 80 tokens"):
        go(folder, "fit", "short", **settings)
    cli, _ = go(folder, "fit", "short2", **{**settings, "model__direction__length": 30})
    log = read_metrics(run_folder(cli.trainer) / "metrics.csv")
    found = read_directions(run_folder(cli.trainer) / "directions.safetensors")
    assert found.facts["short_texts"] == log.last("train/short_texts") >= 0
    assert found.vectors["direct"].shape == (30, 64)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model__direction__layers": "[0, 1]"}, "cannot be at layer 0"),
        ({"model__direction__layers": "[1]", "model__direction__method": "act_add"}, "these directions cover several"),
    ],
)
def test_a_control_vector_that_cannot_be_written_is_refused_before_anything_is_read(folder, settings, message):
    pytest.importorskip("gguf")
    cli = build("fit", arguments(folder, "nogguf", model__gguf="true", **settings))
    with pytest.raises(UserError, match=message):
        cli.run_verb()
    assert not cli.model.collection.bank and not list(run_folder(cli.trainer).glob("*.safetensors"))


@pytest.mark.parametrize(
    ("verb", "settings", "message"),
    [
        ("predict", {}, "nothing says which directions to add"),
        ("predict", {"model__steer__mix": '{"direkt": 1}'}, "no direction is called 'direkt' (did you mean 'direct'?)"),
        ("test", {"model__trial__targets": '["wanderin"]'}, "no direction is called 'wanderin'"),
        ("predict", {"data__prompts": "@asks.jsonl"}, "asks.jsonl:2: no direction is called 'wanderin'"),
        ("test", {"data__judge_share": 0}, "set data.holdout 0.2, data.judge_share 0.3, data.seed 0, or give another"),
        ("validate", {"data__history": "@kinds.jsonl"}, "classes are direct, wandering; those of data.history 0, 1"),
        ("validate", {"model__lm__path": "@narrow"}, "the directions are 64 wide and belong to"),
        ("test", {"model__trial__strengths": "[]"}, "trial.strengths is []; it must be numbers from 0 on"),
        ("validate", {"model__file": "nowhere.safetensors"}, "nowhere.safetensors does not exist"),
        ("fit", {"model__direction__beta": 0.999999}, "lower beta"),
        ("fit", {"model__direction__layer": 9}, "layer 9: this model has 2 decoder layers"),
        ("fit", {"model__direction__metod": "mean"}, "did you mean 'method'"),
    ],
)
@pytest.mark.usefixtures("misfits")
def test_mistakes_are_told_in_one_message(folder, file, verb, settings, message, capsys):
    settings = {k: v.replace("@", f"{folder}/") if isinstance(v, str) else v for k, v in settings.items()}
    settings = {"model__file": file, **settings} if verb != "fit" else settings
    assert door.main([verb, *arguments(folder, "wrong", **settings)]) == 2
    err = capsys.readouterr().err
    assert message.lower() in err.lower() and "Traceback" not in err


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"strengths": [0.1, -0.1]}, "trial.strengths is [0.1, -0.1]; it must be numbers from 0 on"),
        ({"strengths": [float("inf")]}, "trial.strengths is [inf]"),
        ({"targets": []}, "trial.targets is empty"),
        ({"perplexity_ratio": 0.5}, "trial.perplexity_ratio is 0.5; it must be at least 1"),
    ],
)
def test_a_trial_of_nothing_is_refused(wrong, message):
    with pytest.raises(UserError, match=re.escape(message)):
        check_trial(TrialConfig(**wrong))


def test_a_collection_that_goes_on_has_lost_nothing():
    before, after = Collection(DirectionConfig(), 0), Collection(DirectionConfig(), 0)
    numbers = np.arange(4)
    before.bank.add(Features(torch.randn(4, 1, 2), torch.ones(4, 1), numbers % 2, numbers, numbers))
    before.short, before.origin = {7, 2}, {"classes": ["a", "b"], "layers": [1]}
    after.short = {5}
    after.load(before.state())
    assert after.short == {2, 5, 7} and after.origin == before.origin
    assert all(np.array_equal(a, b) for a, b in zip(after.bank.content(), before.bank.content(), strict=True))
