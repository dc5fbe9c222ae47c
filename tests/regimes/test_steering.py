"""The steering regime from end to end, on a student whose texts are of two kinds."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch

from lit_reason.cli import door
from lit_reason.cli.reason_cli import build
from lit_reason.core.metrics_log import read_metrics
from lit_reason.core.run_folder import run_folder
from lit_reason.errors import UserError
from lit_reason.steering.direction_file import read_directions
from lit_reason.tasks import chain
from lit_reason.tasks.problem_file import write_problems
from lit_reason.tasks.student import write_student


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("steering")
    config = chain.ChainConfig()
    write_student(folder / "base", chain.words(config))
    write_problems(folder / "styles.jsonl", partial(chain.styled, config, 0), 120)
    return folder


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
    cli, _ = go(folder, model__gguf="true", model__direction__layers="[1]")
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
    assert len(facts["data_hash"]) == 24


def test_fit_logs_what_the_probe_knows_in_and_out_of_sample(fitted):
    log = read_metrics(fitted[1] / "metrics.csv")
    assert log.last("train/probe_loss") < 0.3 < 0.69 < log.points("train/probe_loss")[0][1]
    assert log.last("val/probe_accuracy") > 0.9 and log.last("val/text_accuracy") > 0.9
    assert 0 <= log.last("val/probe_calibration_error") < 0.5 and 0 <= log.last("val/kept_direct") <= 1
    assert log.last("val/probe_loss") < 0.5 and log.last("val/loss") > 1
    assert {p.name for p in fitted[1].glob("*.gguf")} == {"direct.gguf", "wandering.gguf"}


def test_validate_reads_the_file(folder, file, fitted):
    cli, (figures,) = go(folder, "validate", "validate", model__file=file)
    log = read_metrics(fitted[1] / "metrics.csv")
    assert figures["val/probe_loss"] == pytest.approx(log.last("val/probe_loss"), rel=1e-4)


def test_a_checkpoint_serves_in_place_of_the_file(folder, fitted):
    (checkpoint,) = fitted[1].glob("checkpoints/*.ckpt")
    cli, _ = go(folder, "validate", "ckpt", ckpt_path=checkpoint, model__direction__layers="[1]")
    ours, theirs = cli.model.directions, read_directions(fitted[1] / "directions.safetensors")
    assert ours.layer == theirs.layer and all(torch.equal(ours.vectors[n], theirs.vectors[n]) for n in theirs.vectors)
    with pytest.raises(UserError, match="give model.file, or ckpt_path"):
        go(folder, "validate", "none")


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
        model__steer__mix=json.dumps(mix), model__steer__strength=0.7, data__history=None,
    )  # fmt: skip
    lines = [json.loads(line) for line in (run_folder(cli.trainer) / "predictions.jsonl").read_text().splitlines()]
    assert [(r["row_id"], r["sample"]) for r in lines] == [(f"prompts.jsonl:{i}", s) for i in (1, 2, 3) for s in (0, 1)]
    assert [r["mix"] for r in lines[::2]] == [mix, {"wandering": 2.0}, {"direct": 0.0}]
    assert all(r["strength"] == 0.7 and r["completion"] for r in lines)
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
        assert found.vectors["direct"].shape[0] > 1 and found.facts["first"] == 0


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
        ("test", {"data__judge_share": 0}, "data.judge_share"),
        ("validate", {"model__file": "nowhere.safetensors"}, "nowhere.safetensors does not exist"),
        ("fit", {"model__direction__beta": 0.999999}, "lower beta"),
        ("fit", {"model__direction__layer": 9}, "layer 9: this model has 2 decoder layers"),
        ("fit", {"model__direction__metod": "mean"}, "did you mean 'method'"),
    ],
)
def test_mistakes_are_told_in_one_message(folder, file, verb, settings, message, capsys):
    settings = {"model__file": file, **settings} if verb != "fit" else settings
    assert door.main([verb, *arguments(folder, "wrong", **settings)]) == 2
    err = capsys.readouterr().err
    assert message.lower() in err.lower() and "Traceback" not in err
