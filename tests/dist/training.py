"""A short run in one process or several, and what is kept of it to compare."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny_run import fit
from torch.distributed.tensor import DTensor

from lit_reason.callbacks.hf_export import HFExport
from lit_reason.callbacks.verified_generation import VerifiedGeneration
from lit_reason.core.metrics_log import read_metrics
from lit_reason.rollout.config import SamplingConfig


def whole(tensor):
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


class Watch(Callback):
    """Gradients of the first step before clipping and after it, and the weights at the end."""

    gradients, clipped = {}, {}

    def on_train_start(self, trainer, pl_module):
        """Gradients are let go of right after the step, so they are looked at where they have just been clipped."""
        clip = pl_module.configure_gradient_clipping

        def clip_and_keep(*arguments, **settings):
            clip(*arguments, **settings)
            if not self.clipped:
                self.clipped = {n: whole(p.grad) for n, p in pl_module.named_parameters() if p.grad is not None}

        pl_module.configure_gradient_clipping = clip_and_keep

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.global_step == 0:
            self.gradients = {n: whole(p.grad) for n, p in pl_module.named_parameters() if p.grad is not None}

    def on_train_end(self, trainer, pl_module):
        self.weights = {n: whole(p) for n, p in pl_module.named_parameters()}
        self.sharded = sum(isinstance(p, DTensor) for p in pl_module.parameters())


def train(folder: Path, run: Path, settings: dict[str, Any], ckpt_path: Path | None = None) -> dict[str, Any]:
    """Four steps, then generation and export: what came out of them. A run that goes on makes the other steps alone.

    Args:
        folder: holds model and rows, see `tiny_run.arguments`.
        run: where the run's files go.
        settings: of the run.
        ckpt_path: where to go on from.
    """
    watch = Watch()
    sampling = SamplingConfig(max_new_tokens=6, samples=2, temperature=1.0, batch_size=4)
    answers = VerifiedGeneration(limit=3, at_end=True, sampling=sampling)
    saver = ModelCheckpoint(run / "checkpoints", every_n_train_steps=2, save_top_k=-1, filename="{step}")
    ending = [answers, HFExport(str(run / "export"))] if ckpt_path is None else []
    cli = fit(folder, run, [watch, *ending, saver], ckpt_path, **settings)
    log = Path(cli.trainer.log_dir) / "metrics.csv"
    return {
        "losses": [value for _, value in read_metrics(log).points("train/loss")] if cli.trainer.is_global_zero else [],
        "val": float(cli.trainer.callback_metrics["val/loss"]),
        "gradients": watch.gradients,
        "clipped": watch.clipped,
        "weights": watch.weights,
        "sharded": watch.sharded,
        "completions": [r.completion for r in answers.last.records] if answers.last else [],
    }


def assert_equal_runs(got: dict[str, Any], expected: dict[str, Any]) -> None:
    """Whatever a process found is what one process alone found, but for the order of sums."""
    assert len(set(expected["losses"])) == len(expected["losses"]) == 4
    assert not got["losses"] or got["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    assert got["val"] == pytest.approx(expected["val"], rel=1e-5)
    for what in ("gradients", "clipped", "weights"):
        assert got[what].keys() == expected[what].keys() and got[what]
        for name, value in expected[what].items():
            torch.testing.assert_close(got[what][name], value, rtol=1e-4, atol=2e-6, msg=f"{what} of {name}")
    assert got["completions"] == expected["completions"] != []
