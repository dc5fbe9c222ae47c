import io
import random

import lightning.pytorch as L
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from lit_reason.callbacks import rng_state
from lit_reason.callbacks.rng_state import RngState, restore_rng_states, rng_states


def draws():
    return (
        torch.rand(3).tolist(),
        np.random.rand(3).tolist(),
        np.random.randn(),
        random.random(),
        random.gauss(0, 1),
    )


@pytest.fixture(autouse=True)
def own_random_state():
    states = rng_states()
    yield
    restore_rng_states(states)


def test_states_survive_a_checkpoint_file_that_loads_without_code():
    torch.manual_seed(3), np.random.seed(4), random.seed(5)
    draws()  # leaves a half-used gaussian pair behind in numpy and Python
    file = io.BytesIO()
    torch.save(rng_states(), file)
    expected = draws()
    draws()
    file.seek(0)
    restore_rng_states(torch.load(file, weights_only=True))
    assert draws() == expected


class Dropped(L.LightningModule):
    """Draws from all three generators in every step."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(8, 8)
        self.seen = []

    def training_step(self, batch, batch_idx):
        loss = torch.nn.functional.dropout(self.layer(batch), 0.5).pow(2).mean()
        self.seen.append((loss.item(), np.random.rand(), random.random()))
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(tmp_path, max_steps, callbacks, ckpt_path=None):
    torch.manual_seed(0), np.random.seed(0), random.seed(0)
    module = Dropped()
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=max_steps,
        max_epochs=-1,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    data = torch.arange(32.0).view(4, 8) / 32
    loader = DataLoader(data, batch_size=4, generator=torch.Generator().manual_seed(1))  # same batch each epoch
    trainer.fit(module, loader, ckpt_path=ckpt_path, weights_only=True)
    return trainer, module.seen


def test_a_resumed_run_draws_what_the_uninterrupted_one_drew(tmp_path):
    _, whole = fit(tmp_path, 6, [RngState()])
    trainer, first = fit(tmp_path, 3, [RngState()])
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    _, second = fit(tmp_path, 6, [RngState()], tmp_path / "half.ckpt")
    assert first + second == whole
    _, without = fit(tmp_path, 6, [], tmp_path / "half.ckpt")
    assert without != whole[3:]  # the callback is what makes the difference


def test_each_process_takes_its_own_state_back(monkeypatch):
    torch.manual_seed(1)
    mine = rng_states()
    torch.manual_seed(2)
    other = rng_states()
    callback = RngState()
    callback.load_state_dict({"ranks": [other, mine]})
    callback.on_train_start(trainer_of(rank=1, world=2), None)
    assert torch.equal(torch.get_rng_state(), mine["torch"])


def test_states_of_all_processes_are_saved(monkeypatch):
    monkeypatch.setattr(rng_state, "from_all_ranks", lambda value: ["zero", value])
    ranks = RngState().state_dict()["ranks"]
    assert ranks[0] == "zero" and torch.equal(ranks[1]["torch"], torch.get_rng_state())


def test_another_number_of_processes_keeps_the_seeded_state_and_says_so():
    torch.manual_seed(1)
    saved = rng_states()
    torch.manual_seed(2)
    now = torch.get_rng_state()
    callback = RngState()
    callback.load_state_dict({"ranks": [saved, saved]})
    with pytest.warns(UserWarning, match="of 2 processes and this run has 1"):
        callback.on_train_start(trainer_of(rank=0, world=1), None)
    assert torch.equal(torch.get_rng_state(), now)


def test_a_state_is_restored_once():
    callback = RngState()
    callback.load_state_dict({"ranks": [rng_states()]})
    callback.on_train_start(trainer_of(0, 1), None)
    torch.manual_seed(9)
    now = torch.get_rng_state()
    callback.on_train_start(trainer_of(0, 1), None)
    assert torch.equal(torch.get_rng_state(), now)


def trainer_of(rank, world):
    from types import SimpleNamespace

    return SimpleNamespace(global_rank=rank, world_size=world)
