"""Optimizer from a recipe."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from lit_reason.core.config import OptimConfig
from lit_reason.errors import UserError


def parameter_groups(named: Iterable[tuple[str, nn.Parameter]], weight_decay: float) -> list[dict]:
    """Trainable parameters in two groups: matrices, which decay, and vectors, which do not."""
    trained = [p for _, p in named if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [g for g in groups if g["params"]]


def build_optimizer(module: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """The optimizer of a recipe over the trainable parameters of `module`.

    Args:
        module: its parameters with `requires_grad` are trained.
        config: name, rate, decay, betas, eps.

    Raises:
        UserError: nothing is trainable, or the optimizer needs a package that is not installed.
    """
    groups = parameter_groups(module.named_parameters(), config.weight_decay)
    if not groups:
        raise UserError("the model has no trainable parameter: every weight is frozen")
    settings: dict[str, Any] = {"lr": config.lr, "betas": tuple(config.betas), "eps": config.eps}
    if config.optimizer == "adamw8bit":
        try:
            import bitsandbytes
        except ImportError as error:
            raise UserError("optim.optimizer adamw8bit needs bitsandbytes: pip install 'lit-reason[quant]'") from error
        return bitsandbytes.optim.AdamW8bit(groups, **settings)
    # fused: 5 to 6 times less CPU time a step than the loop, and as fast as it gets on CUDA
    return torch.optim.AdamW(groups, fused=True, **settings)
