"""StopTogether: several processes that are told to stop (SIGTERM) stop after the same step."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer


class StopTogether(Callback):
    """Makes a SIGTERM to any process end training on all of them; `ReasonTrainer` adds it to every run.

    Lightning's handler starts a broadcast wherever the signal happens to arrive, which then meets another
    collective of the other processes, and each process leaves after its own step. Schedulers signal all processes,
    but not at the same instant, so the checkpoint that follows, which all must write together, would hang. Here the
    handler only takes note; after each batch the processes agree by one small reduction.
    """

    def __init__(self) -> None:
        self._told = False

    def setup(self, trainer: Any, pl_module: LightningModule, stage: str) -> None:
        """Take the place of Lightning's handler before it is registered."""
        self._told = False
        if stage == "fit" and trainer.world_size > 1:
            trainer._signal_connector._sigterm_notifier_fn = self._note

    def _note(self, *_: Any) -> None:
        self._told = True

    def on_train_batch_end(self, trainer: Any, pl_module: LightningModule, *_: Any) -> None:
        """Ask whether any process was told to stop; Lightning then ends training after this batch."""
        if trainer.world_size > 1:
            told = torch.tensor(float(self._told), device=trainer.strategy.root_device)
            if trainer.strategy.reduce(told, reduce_op="sum") > 0:
                trainer._signal_connector.received_sigterm = True

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give Lightning its handler back."""
        vars(trainer._signal_connector).pop("_sigterm_notifier_fn", None)
