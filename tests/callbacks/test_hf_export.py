import sys
from types import ModuleType, SimpleNamespace

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from lit_reason.callbacks.hf_export import HFExport, checkpoint_weights
from lit_reason.errors import UserError


class Counting(L.LightningModule):
    """Its weight is the number of steps taken; its validation loss is lowest after two."""

    def __init__(self):
        super().__init__()
        self.lm = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.zeros_(self.lm.weight)
        self.tokenizer = "tokenizer"

    def training_step(self, batch, batch_idx):
        return -self.lm.weight.sum()

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", (self.lm.weight.detach() - 2).abs().sum())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)


@pytest.fixture
def exported(monkeypatch):
    """Calls of export_model, with the weight as it was then."""
    calls = []

    def export_model(lm, tokenizer, folder, *, merge):
        calls.append(SimpleNamespace(weight=lm.weight.item(), tokenizer=tokenizer, folder=folder, merge=merge))

    module = ModuleType("lit_reason.models.export")
    module.export_model = export_model
    monkeypatch.setitem(sys.modules, "lit_reason.models.export", module)
    return calls


def fit(tmp_path, *callbacks, validate=True, **kwargs):
    module, loader = Counting(), DataLoader(torch.zeros(4, 1), batch_size=1)
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        callbacks=list(callbacks),
        logger=False,
        default_root_dir=tmp_path,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        val_check_interval=1,
        **kwargs,
    )
    trainer.fit(module, loader, DataLoader(torch.zeros(1, 1)) if validate else None)
    return module


def best_of(tmp_path):
    return ModelCheckpoint(tmp_path / "c", monitor="val/loss", save_on_train_epoch_end=False)


def test_last_weights_by_default(tmp_path, exported):
    fit(tmp_path, HFExport("out", merge=False), best_of(tmp_path))
    (call,) = exported
    assert (call.weight, call.tokenizer, call.folder, call.merge) == (
        4.0,
        "tokenizer",
        tmp_path / "out",
        False,
    )


def test_best_weights_are_exported_and_the_last_ones_come_back(tmp_path, exported):
    module = fit(tmp_path, HFExport(which="best"), best_of(tmp_path))
    (call,) = exported
    assert (call.weight, call.folder, call.merge) == (2.0, tmp_path / "export", True)
    assert module.lm.weight.item() == 4.0


def test_last_weights_come_back_when_the_export_fails(tmp_path, exported, monkeypatch):
    def broken(*args, **kwargs):
        raise OSError("no space left on device")

    sys.modules["lit_reason.models.export"].export_model = broken
    seen = []
    monkeypatch.setattr(Counting, "on_exception", lambda *a: None, raising=False)

    class Keep(L.Callback):
        def on_exception(self, trainer, pl_module, exception):
            seen.append(pl_module.lm.weight.item())

    with pytest.raises(OSError, match="no space"):
        fit(tmp_path, HFExport(which="best"), best_of(tmp_path), Keep())
    assert seen == [4.0]


def test_best_without_a_monitoring_checkpoint_is_refused_before_training(tmp_path, exported):
    with pytest.raises(UserError, match="monitor"):
        fit(tmp_path, HFExport(which="best"), ModelCheckpoint(dirpath=tmp_path / "c"))
    assert not exported


def test_best_that_was_never_scored_falls_back_to_last_with_a_warning(tmp_path, exported):
    with pytest.warns(UserWarning, match="ever scored"):
        fit(
            tmp_path,
            HFExport(which="best"),
            ModelCheckpoint(dirpath=tmp_path / "c", monitor="other", every_n_epochs=9),
        )
    assert exported[0].weight == 4.0


def test_unknown_choice_is_refused():
    with pytest.raises(UserError, match="'first'.*last, best"):
        HFExport(which="first")


def test_checkpoint_weights_say_what_is_wrong(tmp_path):
    with pytest.raises(UserError, match="not there any more"):
        checkpoint_weights(tmp_path / "gone.ckpt")
    torch.save({"a": torch.ones(1)}, tmp_path / "other.ckpt")
    with pytest.raises(UserError, match="state_dict"):
        checkpoint_weights(tmp_path / "other.ckpt")
