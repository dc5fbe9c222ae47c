"""`lit-reason plan RECIPE`: what a run will need in memory, before it starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lit_reason.errors import UserError

if TYPE_CHECKING:
    from lit_reason.core.memory_trace import StepMemory

USAGE = """\
Usage: lit-reason plan RECIPE [options of fit]

Parameters, weights, gradients, optimizer state, activations and peak of a training step, without data and without
allocating them, and the same model under other methods. The peak is that of tensors; a process needs about 0.5 GB more
for its libraries.

Examples
  lit-reason plan pretrain/llama-60m-lowrank-restarts
  lit-reason plan pretrain/llama-1b-full --model.lm.dtype bfloat16 --trainer.devices 4 --trainer.strategy fsdp2"""
MIXED = {"bf16-mixed": "bfloat16", "16-mixed": "float16"}
WHOLE = {"bf16-true": "bfloat16", "16-true": "float16", "32-true": "float32"}


def main(argv: Sequence[str]) -> int:
    """Run the verb.

    Args:
        argv: arguments after `plan`.

    Returns:
        0; what the user gave wrong is raised as UserError.
    """
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if argv else 2
    options = list(argv) if argv[0].startswith("-") else ["--config", *argv]
    print(plan(options))
    return 0


def plan(argv: Sequence[str]) -> str:
    """The text of a plan.

    Args:
        argv: arguments of `fit`.

    Raises:
        UserError: the recipe is wrong, or its model or micro-batch cannot be planned.
    """
    import torch

    from lit_reason.cli.reason_cli import build
    from lit_reason.core.memory_trace import trace_step
    from lit_reason.models.language_model import LanguageModel

    cli = build("fit", argv, with_trainer=False)
    regime: Any = cli.model
    trainer = cli.config["trainer"]
    precision = str(trainer.get("precision") or "32-true")
    config = regime.lm_config
    if config.adapter is not None and config.adapter.quantize != "none":
        raise UserError("plan: quantised models are not counted; set lm.adapter.quantize to none for an upper bound")
    if precision in WHOLE and config.dtype == "auto":
        config = replace(config, dtype=WHOLE[precision] if precision != "32-true" else "auto")
    lengths = micro_batch(cli.datamodule)
    with torch.device("meta"):
        regime.lm = LanguageModel.load(replace(config, compile=False))
    autocast = getattr(torch, MIXED[precision]) if precision in MIXED else None
    found = trace_step(regime, lengths, accumulate=int(trainer.get("accumulate_grad_batches") or 1), autocast=autocast)
    lines = [*_step_table(found, regime, lengths)]
    if _count(trainer) > 1:
        lines += ["", *_devices(found, trainer)]
    if config.adapter is None:
        rank = config.lowrank.rank if config.lowrank is not None else regime.optim_config.subspace.rank
        lines += ["", *_method_table(regime.lm, rank)]
    return "\n".join(lines)


def micro_batch(data: Any) -> list[int]:
    """Row lengths of the largest micro-batch.

    Args:
        data: a data module.

    Raises:
        UserError: it does not say how large its micro-batches are.
    """
    longest, tokens, rows = (getattr(data, name, None) for name in ("max_length", "batch_tokens", "batch_rows"))
    if not longest or not (tokens or rows):
        raise UserError(f"plan: {type(data).__name__} has no max_length with batch_tokens or batch_rows")
    return [longest] * int(rows or max(1, tokens // longest))


def _step_table(found: StepMemory, regime: Any, lengths: list[int]) -> list[str]:
    rows = [
        ("weights", found.weights),
        ("gradients", found.gradients),
        (f"optimizer ({regime.optim_config.optimizer})", found.optimizer),
        ("activations", found.activations),
        ("peak of a step", found.peak),
    ]
    kind, dtype = type(regime.lm.base).__name__, str(regime.lm.head.weight.dtype).removeprefix("torch.")
    return [
        f"{kind}: {found.parameters / 1e6:,.1f} M parameters, {found.trained / 1e6:,.1f} M trained, {dtype}; "
        f"{len(lengths)} rows of {lengths[0]:,} tokens a micro-batch",
        "",
        f"{'one device':<28}{'GB':>9}",
        *(f"  {name:<26}{size / 1e9:9.3f}" for name, size in rows),
    ]


def _count(trainer: Any) -> int:
    devices, nodes = trainer.get("devices"), int(trainer.get("num_nodes") or 1)
    text = str(devices)
    return nodes * (int(text) if text.isdigit() else 1)


def _devices(found: StepMemory, trainer: Any) -> list[str]:
    """Estimates for several devices: what is held in parts, and what communication adds."""
    number, strategy = _count(trainer), str(trainer.get("strategy"))
    if "fsdp" in strategy:
        parts = found.weights + found.gradients + found.optimizer
        size, how = (
            found.peak - parts + parts / number,
            "weights, gradients and state in parts; gathered layers come on top",
        )
    else:
        size, how = found.peak + found.gradients, "a copy of everything, and buckets for the sum of gradients"
    return [f"each of {number} devices ({strategy}): about {size / 1e9:.3f} GB: {how}"]


def _method_table(lm: Any, rank: int) -> list[str]:
    """Every method on this model; the rank is cut to the shortest side."""
    from lit_reason.core.memory_methods import METHODS, method_bytes
    from lit_reason.models.lowrank import hidden_matrices

    shapes, held = hidden_matrices(lm.base)
    others = lm.parameter_counts().total - held
    rank, number_bytes = min(rank, *(min(sides) for sides in shapes)), lm.head.weight.dtype.itemsize
    title = f"this model by method, rank {rank}"
    lines = [f"{title:<28}{'weights':>9}{'+ state':>9}{'+ grads':>9}   GB, {number_bytes} bytes a number"]
    for method in METHODS:
        found = method_bytes(method, shapes, others, rank, number_bytes=number_bytes)
        sums = [found.weights, found.weights + found.optimizer, sum(found)]
        lines.append(f"  {method:<26}" + "".join(f"{size / 1e9:9.3f}" for size in sums))
    return lines
