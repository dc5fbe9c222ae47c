"""SFT as a user runs it: recipe in, losses, checkpoints and figures out."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from tiny_run import arguments, fit, write_model, write_traces
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lit_reason.callbacks.rng_state import RngState
from lit_reason.cli.reason_cli import build
from lit_reason.core.metrics_log import read_metrics
from lit_reason.errors import UserError
from lit_reason.kernels.dispatch import backends_used


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    base = tmp_path_factory.mktemp("tiny")
    write_model(base / "model")
    write_traces(base / "traces.jsonl")
    return base


class Watch(Callback):
    """Losses of all micro-batches, and the gradients of each optimizer step."""

    def __init__(self):
        self.losses, self.gradients = [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(float(outputs["loss"]))

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.gradients.append([p.grad.clone() for p in pl_module.parameters() if p.grad is not None])


def test_the_loss_falls(folder, tmp_path):
    watch = Watch()
    cli = fit(folder, tmp_path, [watch], trainer__max_steps=40)
    assert sum(watch.losses[-5:]) / 5 < 0.6 * watch.losses[0]
    log = read_metrics(Path(cli.trainer.log_dir) / "metrics.csv")
    points = log.points("train/loss")
    assert len(points) == 40
    assert [v for _, v in points] == pytest.approx(watch.losses, rel=1e-4)


def test_gradients_are_held_between_micro_batches_but_not_into_the_next_step(folder, tmp_path):
    class Held(Callback):
        after = []

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.after.append(sum(p.grad is not None for p in pl_module.parameters()))

    held = Held()
    fit(folder, tmp_path, [held], trainer__max_steps=2, data__batch_rows=2, trainer__accumulate_grad_batches=2)
    assert held.after[0] == held.after[2] > 10
    assert held.after[1] == held.after[3] == 0


def test_micro_batches_give_the_gradient_of_one_batch(folder, tmp_path):
    """Rows differ in length, so a mean of micro-batch means would be wrong."""
    once, four = Watch(), Watch()
    fit(folder, tmp_path, [once], trainer__max_steps=2)
    fit(folder, tmp_path, [four], trainer__max_steps=2, data__batch_rows=2, trainer__accumulate_grad_batches=4)
    assert len(once.gradients) == len(four.gradients) == 2 and len(four.losses) == 8
    for a, b in zip(once.gradients[0], four.gradients[0], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    # 40 rows, 8 a step: the last, incomplete window of an epoch is normalised by what it holds
    assert once.losses[0] == pytest.approx(sum(four.losses[:4]) / 1, rel=1e-5)


def test_an_incomplete_last_window_is_normalised_by_its_own_weight(folder, tmp_path):
    whole, rest = Watch(), Watch()
    fit(folder, tmp_path, [whole], trainer__max_epochs=1, trainer__max_steps=-1, data__batch_rows=40)
    settings = {"data__batch_rows": 16, "trainer__accumulate_grad_batches": 8}  # 3 micro-batches of 8 wanted
    fit(folder, tmp_path, [rest], trainer__max_epochs=1, trainer__max_steps=-1, **settings)
    assert len(rest.gradients) == 1
    for a, b in zip(whole.gradients[0], rest.gradients[0], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_segment_weights_change_the_loss_as_written(folder, tmp_path):
    plain, marked = Watch(), Watch()
    fit(folder, tmp_path, [plain], trainer__max_steps=1)
    cli = fit(folder, tmp_path, [marked], trainer__max_steps=1, data__render__weights='{"exploration": 0.0}')
    assert plain.losses != marked.losses
    log = read_metrics(Path(cli.trainer.log_dir) / "metrics.csv")
    assert not log.points("train/loss_exploration")
    assert log.points("train/loss_solution") and log.points("train/loss_end")


def test_condensed_traces_are_shorter_and_have_a_seam(folder, tmp_path):
    full = fit(folder, tmp_path, trainer__max_steps=1)
    short = fit(folder, tmp_path, trainer__max_steps=1, data__condense__strategy="epic")
    tokens = [int(c.datamodule.stores["train"].lengths.sum()) for c in (full, short)]
    assert 0.5 < tokens[1] / tokens[0] < 0.85
    log = read_metrics(Path(short.trainer.log_dir) / "metrics.csv")
    assert log.points("train/loss_seam") and not log.points("train/loss_decile_5")
    assert short.datamodule.ledger["condensation"]["rows"]["condensed"] > 0


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop", [3, 5])  # an epoch has 5 steps: within it, and at its end
def test_a_resumed_run_continues_bit_for_bit(folder, tmp_path, workers, stop):
    settings = {"model__lm__overrides": '{"attention_dropout": 0.2}', "data__workers": workers}
    whole, head, tail = Watch(), Watch(), Watch()
    fit(folder, tmp_path, [whole, RngState()], trainer__max_steps=8, **settings)
    cli = fit(folder, tmp_path, [head, RngState()], trainer__max_steps=stop, **settings)
    cli.trainer.save_checkpoint(tmp_path / "stop.ckpt")
    fit(folder, tmp_path, [tail, RngState()], ckpt_path=tmp_path / "stop.ckpt", trainer__max_steps=8, **settings)
    assert head.losses + tail.losses == whole.losses


def test_an_adapter_checkpoint_holds_the_adapter_alone_and_resumes(folder, tmp_path):
    settings = {"model__lm__adapter__rank": 4, "model__lm__adapter__dropout": 0.2}
    whole, head, tail = Watch(), Watch(), Watch()
    fit(folder, tmp_path, [whole, RngState()], trainer__max_steps=6, **settings)
    cli = fit(folder, tmp_path, [head, RngState()], trainer__max_steps=2, **settings)
    cli.trainer.save_checkpoint(tmp_path / "stop.ckpt")
    saved = torch.load(tmp_path / "stop.ckpt", weights_only=True)["state_dict"]
    assert saved and all("lora_" in name for name in saved)
    fit(folder, tmp_path, [tail, RngState()], ckpt_path=tmp_path / "stop.ckpt", trainer__max_steps=6, **settings)
    assert head.losses + tail.losses == whole.losses


def test_a_checkpoint_of_another_recipe_is_refused(folder, tmp_path):
    cli = fit(folder, tmp_path, trainer__max_steps=1)
    cli.trainer.save_checkpoint(tmp_path / "full.ckpt")
    with pytest.raises(UserError, match="does not fit this recipe.*lora"):
        fit(folder, tmp_path, ckpt_path=tmp_path / "full.ckpt", model__lm__adapter__rank=4)
    write_model(tmp_path / "model", vocabulary=80)
    with pytest.raises(UserError, match=r"does not fit this recipe.*\(64, 32\).*\(80, 32\)"):
        fit(folder, tmp_path, ckpt_path=tmp_path / "full.ckpt", model__lm__path=tmp_path / "model")


def test_rows_longer_than_the_model_allows_are_refused(folder, tmp_path):
    with pytest.raises(UserError, match="max_length is 300, but the model is made for 256 tokens"):
        fit(folder, tmp_path, data__max_length=300)


class LargestTensor(TorchDispatchMode):
    """Notes the largest tensor that any operation returns."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        self.largest = max([self.largest, *sizes])
        return out


def test_training_never_holds_logits_of_all_tokens(folder, tmp_path):
    vocabulary = 4096
    write_model(tmp_path / "model", vocabulary=vocabulary)
    settings = {"model__lm__path": tmp_path / "model", "data__batch_rows": 40, "trainer__max_steps": 1}
    cli = fit(folder, tmp_path, **settings)
    batch = next(iter(cli.datamodule.train_dataloader()))
    trained = batch.index.numel()
    assert trained > 700
    with LargestTensor() as watch:
        cli.model.score(batch).loss_sum.backward()
    assert 512 * vocabulary >= watch.largest, "a chunk of 512 rows is the largest there may be"
    assert watch.largest < 0.75 * trained * vocabulary


def test_evaluate_and_predict_answer_the_held_out_problems(folder, tmp_path, capsys):
    extra = {"data__holdout": 6, "trainer__max_steps": None, "model__sampling__max_new_tokens": 8}
    cli = build("evaluate", [*arguments(folder, tmp_path, **extra), "--limit=5"])
    figures = cli.trainer.evaluate(cli.model, datamodule=cli.datamodule, limit=5)
    assert 0 <= figures[0]["val/pass@1_low"] <= figures[0]["val/pass@1"] <= figures[0]["val/pass@1_high"] <= 1
    assert "pass@1" in capsys.readouterr().out
    cli = build("predict", arguments(folder, tmp_path, **extra))
    cli.trainer.predict(cli.model, datamodule=cli.datamodule)
    assert f"predictions  {Path(cli.trainer.log_dir) / 'predictions.jsonl'}" in capsys.readouterr().out
    lines = (Path(cli.trainer.log_dir) / "predictions.jsonl").read_text().splitlines()
    assert len(lines) == len(cli.datamodule.eval_prompts())


def test_every_backend_of_the_head_loss_gives_the_same_200_losses(folder, tmp_path, monkeypatch):
    """Sums run in another order, and nothing else differs; chunks are small, so that there are several."""
    monkeypatch.setattr("lit_reason.kernels.chunks.ROWS_ON_CPU", 64)
    curves = {}
    for backend in ("reference", "torch"):
        watch = Watch()
        monkeypatch.setenv("LIT_REASON_KERNELS", backend)
        monkeypatch.setattr("lit_reason.kernels.dispatch._used", {})
        fit(folder, tmp_path / backend, [watch], trainer__max_steps=200, model__optim__lr=1e-3)
        assert backends_used() == {"linear_token_loss": backend}
        curves[backend] = watch.losses
    assert len(curves["torch"]) == 200 and curves["torch"][-1] < 0.5 * curves["torch"][0]
    assert curves["torch"] == pytest.approx(curves["reference"], rel=1e-4)
