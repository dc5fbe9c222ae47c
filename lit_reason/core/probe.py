"""Probes: what a trained model does after something was done to its weights, which are put back afterwards"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from lit_reason.core.run_folder import run_folder
from lit_reason.data.reading.row_files import complete_or_absent
from lit_reason.errors import UserError


@contextmanager
def weights_put_back(module: nn.Module) -> Iterator[None]:
    """Change the weights as you like while the context lasts; they are bit for bit what they were afterwards.

    Args:
        module: whose parameters to keep.
    """
    kept = {name: p.detach().clone() for name, p in module.named_parameters()}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                parameter.copy_(kept[name])
                parameter.grad = None


def need_scores(pl_module: Any, probe: str) -> None:
    """Refuse a module that cannot say what it remembers.

    Args:
        pl_module: the module of the run.
        probe: name of the callback that asks.

    Raises:
        UserError: it has no `rescore`.
    """
    if not hasattr(pl_module, "rescore"):
        raise UserError(f"{probe} asks what a model remembers: it needs UnlearnRegime, not {type(pl_module).__name__}")


def need_whole_weights(pl_module: Any, probe: str) -> None:
    """Refuse weights in shards, which a probe cannot change and put back.

    Args:
        pl_module: the module of the run.
        probe: name of the callback that asks.

    Raises:
        UserError: its weights are spread over processes.
    """
    if pl_module.device_mesh is not None:
        raise UserError(f"{probe} changes whole weights and puts them back; use trainer.strategy auto or ddp with it")


def report(trainer: Trainer, name: str, figures: Mapping[str, float]) -> None:
    """Log the figures of a probe under `probe/`, write them to `NAME.json` in the run folder, and say where.

    Args:
        trainer: of the run.
        name: of the probe.
        figures: by name.
    """
    shown = {f"probe/{name}_{key}": value for key, value in figures.items()}
    for logger in trainer.loggers:
        logger.log_metrics(shown, step=trainer.global_step)
    trainer.callback_metrics.update({key: torch.tensor(value) for key, value in shown.items()})
    folder = run_folder(trainer)  # asks all processes
    if trainer.is_global_zero:
        folder.mkdir(parents=True, exist_ok=True)
        with complete_or_absent(folder / f"{name}.json") as unfinished:
            unfinished.write_text(json.dumps(dict(figures), indent=2) + "\n", encoding="utf-8")
    rank_zero_info(", ".join(f"{key} {value:.3f}" for key, value in shown.items()))
