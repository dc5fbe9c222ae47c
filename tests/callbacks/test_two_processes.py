"""Callbacks that exchange something between processes, in real runs of two."""

import os

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from test_throughput import Packs, Toy
from torch.utils.data import DataLoader

from lit_reason.callbacks.rng_state import RngState
from lit_reason.callbacks.throughput import Throughput

pytestmark = [pytest.mark.dist, pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")]


class Draws(Toy):
    """Leaves the number that each process draws in each step in a file of that process."""

    def __init__(self, folder):
        super().__init__()
        self.folder = folder

    def setup(self, stage):
        torch.manual_seed(self.global_rank)

    def training_step(self, batch, batch_idx):
        with open(self.folder / f"drawn-{self.global_rank}.txt", "a") as file:
            file.write(f"{torch.rand(()).item()}\n")
        return super().training_step(batch, batch_idx)


def fit(folder, steps, *callbacks, module, ckpt_path=None):
    """Two processes, each with the same packs of 4, 5, 6, ... tokens; the checkpoint of the last step stays."""
    trainer = L.Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp_fork",
        max_epochs=-1,
        max_steps=steps,
        log_every_n_steps=2,
        use_distributed_sampler=False,
        logger=CSVLogger(folder, name="run", version=0),
        callbacks=list(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(module, DataLoader(Packs(8), batch_size=None), ckpt_path=ckpt_path, weights_only=True)


class SaveAtEnd(L.Callback):
    def __init__(self, path):
        self.path = path

    def on_train_end(self, trainer, pl_module):
        trainer.save_checkpoint(self.path)


def drawn(folder):
    return [(folder / f"drawn-{rank}.txt").read_text().split() for rank in (0, 1)]


def test_tokens_of_both_count_and_each_takes_its_random_state_back(tmp_path):
    whole, half = tmp_path / "whole", tmp_path / "half"
    whole.mkdir(), half.mkdir()
    fit(whole, 4, RngState(), module=Draws(whole))
    saved = half / "two.ckpt"
    fit(half, 2, Throughput(), RngState(), SaveAtEnd(saved), module=Draws(half))
    state = torch.load(saved, weights_only=True)["callbacks"]["Throughput"]
    assert (state["steps"], state["tokens"], state["trained_tokens"]) == (2, 2 * (4 + 5), 2 * (0 + 1))
    fit(half, 4, Throughput(), RngState(), module=Draws(half), ckpt_path=saved)
    zero, one = drawn(half)
    assert [zero, one] == drawn(whole) and len(zero) == 4 and zero != one
