"""The same file of directions plugs into another regime, and leaves nothing behind."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from tiny_run import arguments, write_model, write_traces

from lit_reason.callbacks.steering import Steering
from lit_reason.cli.reason_cli import build
from lit_reason.errors import UserError
from lit_reason.models.config import ModelConfig
from lit_reason.models.language_model import LanguageModel
from lit_reason.steering.config import SteerConfig
from lit_reason.steering.direction_file import Directions, model_facts, save_directions


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("callback")
    write_model(folder / "model")
    write_traces(folder / "traces.jsonl", 24)
    lm = LanguageModel.load(ModelConfig(path=str(folder / "model"), dtype="float32"))
    vector = torch.randn(32, generator=torch.Generator().manual_seed(0))
    there = Directions({"kind": vector}, 0, 3.0, None, {"model": model_facts(lm.base, "tiny"), "classes": ["kind"]})
    save_directions(there, folder / "d.safetensors")
    save_directions(replace(there, vectors={"kind": torch.randn(16)}), folder / "narrow.safetensors")
    return folder


def validated(folder, *, file="d.safetensors", verb="validate", **steer):
    options = arguments(folder, folder, data__val_file=folder / "traces.jsonl", trainer__max_steps=2)
    if steer:
        options += ["--trainer.callbacks+=Steering", f"--trainer.callbacks.file={folder / file}"]
        options += [f"--trainer.callbacks.{name}={json.dumps(value)}" for name, value in steer.items()]
    cli = build(verb, options)
    return cli, cli.run_verb()


@pytest.fixture(scope="module")
def bare(folder):
    return validated(folder)[1][0]["val/loss"]


MIX = {"mix": {"kind": 1.0}, "strength": 0.5}


def test_validation_of_any_regime_is_steered(folder, bare):
    losses = {}
    for phases in ("all", "prompt", "generation"):
        cli, (figures,) = validated(folder, steer={**MIX, "phases": phases})
        losses[phases] = figures["val/loss"]
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in cli.model.lm.modules())
    assert len({bare, *losses.values()}) == 4
    assert validated(folder, steer={**MIX, "strength": 0.0})[1][0]["val/loss"] == bare


def test_the_phases_of_a_scored_row_meet_at_its_answer(folder):
    """Steering the prompt alone leaves the states of the answer's tokens at that layer as they were."""
    from lit_reason.steering.collect import collected

    cli, _ = validated(folder)
    batch = next(iter(cli.datamodule.val_dataloader()))
    lm, callback = cli.model.lm.eval(), Steering(str(folder / "d.safetensors"), SteerConfig(**MIX, phases="prompt"))
    callback._begin("validate", cli.model)
    callback._batch("validate", batch)
    with torch.no_grad(), collected(lm.base, [0]) as steered:
        lm.hidden(batch.ids, batch.positions, batch.cu_seqlens)
    callback._end("validate")
    with torch.no_grad(), collected(lm.base, [0]) as plain:
        lm.hidden(batch.ids, batch.positions, batch.cu_seqlens)
    moved = (steered[0] - plain[0])[0].abs().amax(-1) > 0
    assert torch.equal(moved, batch.weight == 0) and moved.any() and not moved.all()


class Losses(Callback):
    def __init__(self):
        self.train = []

    def on_train_batch_end(self, trainer, pl_module, outputs, *_):
        self.train.append(float(outputs["loss"]))


def test_stages_are_kept_apart(folder, bare):
    """A fit whose validation is steered trains as it would without; one whose training is steered does not."""
    found = {}
    for stages in (None, ["validate"], ["train"]):
        options = arguments(folder, folder, data__val_file=folder / "traces.jsonl", trainer__max_steps=3)
        cli = build("fit", options)
        losses = Losses()
        steering = [Steering(str(folder / "d.safetensors"), SteerConfig(**MIX), stages)] if stages else []
        cli.trainer.callbacks += [losses, *steering]
        cli.run_verb()
        found[str(stages)] = losses.train, float(cli.trainer.callback_metrics["val/loss"])
        assert not any(m._forward_hooks for m in cli.model.lm.base.model.layers)
    plain, validating, training = found.values()
    assert plain[0] == validating[0] != training[0] and plain[1] != validating[1]


def test_predictions_are_steered(folder):
    _, plain = validated(folder, verb="predict")
    _, steered = validated(folder, verb="predict", steer={**MIX, "strength": 4.0})
    texts = [[r["completion"] for batch in run for r in batch] for run in (plain, steered)]
    assert len(texts[0]) == len(texts[1]) and texts[0] != texts[1]


def test_what_cannot_steer_is_refused(folder):
    with pytest.raises(UserError, match="16 wide and belong to tiny; this model is 32 wide"):
        validated(folder, file="narrow.safetensors", steer=MIX)
    with pytest.raises(UserError, match=r"no direction is called 'kin' \(did you mean 'kind'\?\)"):
        validated(folder, steer={"mix": {"kin": 1.0}})
    with pytest.raises(UserError, match="steer.mix is empty.*has kind"):
        validated(folder, steer={"strength": 1.0})
    with pytest.raises(UserError, match=r"stages is \['later'\]"):
        Steering(str(folder / "d.safetensors"), SteerConfig(**MIX), ["later"])


def test_a_layer_that_never_ran_is_no_success(folder):
    cli, _ = validated(folder)
    callback = Steering(str(folder / "d.safetensors"), SteerConfig(**MIX))
    callback._begin("validate", cli.model)
    with pytest.raises(RuntimeError, match="nothing was steered"):
        callback._end("validate")
