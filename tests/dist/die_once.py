"""Callbacks for runs under torchrun: a process that is killed once, and the weights at the end."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import torch
from lightning.pytorch import Callback
from training import whole


class DieOnce(Callback):
    """Kills the second process after a step, without warning, the first time it gets there.

    Args:
        marker: file that says it has happened.
        step: optimizer steps before.
    """

    def __init__(self, marker: str, step: int) -> None:
        self.marker, self.step = Path(marker), step

    def on_train_batch_end(self, trainer, pl_module, *_) -> None:
        if trainer.global_rank == 1 and trainer.global_step == self.step and not self.marker.exists():
            self.marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)


class KeepWeights(Callback):
    """Writes the whole weights when training is over.

    Args:
        path: the file.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path)

    def on_train_end(self, trainer, pl_module) -> None:
        weights = {name: whole(weight) for name, weight in pl_module.named_parameters()}
        if trainer.is_global_zero:
            torch.save(weights, self.path)
