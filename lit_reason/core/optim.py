"""Optimizer from a recipe."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Optimizer

from lit_reason.core.config import OptimConfig
from lit_reason.errors import UserError
from lit_reason.models.lowrank import lowrank_layers
from lit_reason.optim.apollo import Apollo
from lit_reason.optim.fira import Fira
from lit_reason.optim.galore import GaLore
from lit_reason.optim.loro import Loro
from lit_reason.optim.together import Together

SCALES = {"galore": 0.25, "fira": 0.25, "apollo": 1.0, "apollo_mini": 128.0}  # as published


def parameter_groups(
    module: nn.Module, config: OptimConfig, without: Iterable[nn.Parameter] = ()
) -> list[dict[str, Any]]:
    """Trainable parameters in groups: matrices, which decay, those of hidden layers at their rate, and vectors.

    Args:
        module: its parameters with `requires_grad`.
        config: gives rate, rate of hidden matrices and decay; where both rates are the same, so is the group.
        without: parameters that belong to another group.
    """
    left_out = {id(p) for p in without}
    trained = [p for p in module.parameters() if p.requires_grad and id(p) not in left_out]
    slow = {id(p) for p in hidden_matrices(module)} if config.hidden_lr != 1.0 else set()
    matrices = [p for p in trained if p.ndim >= 2]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in matrices if id(p) not in slow], "weight_decay": config.weight_decay},
        {
            "params": [p for p in matrices if id(p) in slow],
            "weight_decay": config.weight_decay,
            "lr": hidden_lr(config),
        },
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [g for g in groups if g["params"]]


def hidden_lr(config: OptimConfig) -> float:
    """Learning rate of the matrices of hidden layers."""
    return config.lr * config.hidden_lr


def hidden_matrices(module: nn.Module) -> list[nn.Parameter]:
    """The trainable matrices of hidden layers: neither embeddings nor the output layer.

    Args:
        module: a regime, whose `lm.head` says which the output layer is, or any other module.
    """
    ends = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    if hasattr(module, "lm"):
        lm: Any = module.lm
        ends.add(id(lm.head.weight))
    return [p for p in module.parameters() if p.requires_grad and p.ndim == 2 and id(p) not in ends]


class Rate(NamedTuple):
    """The learning rate of a part of the model.

    Args:
        lr: its highest; None for the recipe's.
        warmup: share of all optimizer steps over which it rises; None for the recipe's.
    """

    lr: float | None = None
    warmup: float | None = None


def with_rates(groups: list[dict[str, Any]], rates: Mapping[nn.Parameter, Rate]) -> list[dict[str, Any]]:
    """Groups of which some parameters are split off, with learning rates of their own.

    Args:
        groups: as `parameter_groups` gives them.
        rates: rate of each of these parameters; a group's `warmup` is what the schedule reads.
    """
    found = []
    for group in groups:
        by_rate: dict[Rate, list[nn.Parameter]] = defaultdict(list)
        for parameter in group["params"]:
            by_rate[rates.get(parameter, Rate())].append(parameter)
        for rate, chosen in by_rate.items():
            own = {name: value for name, value in rate._asdict().items() if value is not None}
            found.append({**group, "params": chosen, **own})
    return found


def build_optimizer(
    module: nn.Module, config: OptimConfig, rates: Mapping[nn.Parameter, Rate] | None = None
) -> Optimizer:
    """The optimizer of a recipe over the trainable parameters of `module`.

    Args:
        module: its parameters with `requires_grad` are trained.
        config: name, rate, decay, betas, eps, subspace.
        rates: parameters with a learning rate of their own.

    Raises:
        UserError: nothing is trainable, the optimizer needs a package that is not installed, or does not fit the model.
    """
    if rates and config.optimizer not in ("adamw", "adamw8bit"):
        raise UserError(f"a learning rate for a part of the model needs optim.optimizer adamw, not {config.optimizer}")
    groups = with_rates(parameter_groups(module, config), rates or {})
    if not groups:
        raise UserError("the model has no trainable parameter: every weight is frozen")
    settings: dict[str, Any] = {"lr": config.lr, "betas": tuple(config.betas), "eps": config.eps}
    if config.optimizer == "adamw":
        # fused: 5 to 6 times less CPU time a step than the loop, and as fast as it gets on CUDA
        return AdamW(groups, fused=True, **settings)
    if config.optimizer == "adamw8bit":
        try:
            import bitsandbytes
        except ImportError as error:
            raise UserError("optim.optimizer adamw8bit needs bitsandbytes: pip install 'lit-reason[quant]'") from error
        return bitsandbytes.optim.AdamW8bit(groups, **settings)
    if config.optimizer == "loro":
        return _loro(module, config, settings)
    matrices = hidden_matrices(module)
    if not matrices:
        raise UserError(f"optim.optimizer {config.optimizer}: the model has no trainable matrix in a hidden layer")
    rest = parameter_groups(module, config, without=matrices)
    special = _special(matrices, config, settings)
    return Together(special, AdamW(rest, fused=True, **settings)) if rest else special


def _special(matrices: list[nn.Parameter], config: OptimConfig, settings: dict[str, Any]) -> Optimizer:
    """The optimizer of the hidden matrices."""
    decay, name = config.weight_decay, config.optimizer
    if name == "muon":
        # This adjustment gives updates the size of AdamW's, so that one rate serves both.
        return torch.optim.Muon(matrices, lr=hidden_lr(config), weight_decay=decay, adjust_lr_fn="match_rms_adamw")
    _refuse_shards(matrices, name)
    subspace = config.subspace
    common = {
        **settings,
        "lr": hidden_lr(config),
        "weight_decay": decay,
        "rank": 1 if name == "apollo_mini" else subspace.rank,
        "refresh_steps": subspace.refresh_steps,
        "scale": SCALES[name] if subspace.scale is None else subspace.scale,
    }
    if name == "galore":
        return GaLore(matrices, **common)
    if name == "fira":
        return Fira(matrices, paper_exact=subspace.paper_exact, **common)
    return Apollo(matrices, per_tensor=name == "apollo_mini", seed=torch.initial_seed() % 2**32, **common)


def _loro(module: nn.Module, config: OptimConfig, settings: dict[str, Any]) -> Loro:
    layers = [layer for _, layer in lowrank_layers(module)]
    if not layers:
        raise UserError("optim.optimizer loro trains the factors of low-rank layers: set lm.lowrank")
    factors = [p for layer in layers for p in (layer.out_factor, layer.in_factor)]
    _refuse_shards(factors, "loro")
    rest = parameter_groups(module, config, without=factors)
    pairs = {"params": factors, "scales": [layer.scale for layer in layers], "lr": hidden_lr(config)}
    return Loro([pairs, *rest], exact_steps=config.subspace.refresh_steps, **settings)


def _refuse_shards(matrices: list[nn.Parameter], name: str) -> None:
    if any(isinstance(p, DTensor) for p in matrices):
        raise UserError(
            f"optim.optimizer {name} needs whole matrices, not shards: use trainer.strategy ddp, not fsdp2, or "
            "optim.optimizer adamw, whose state fsdp2 holds in parts (with lm.lowrank it is small, too)"
        )
