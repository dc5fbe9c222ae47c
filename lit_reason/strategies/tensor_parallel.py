"""Tensor parallelism: the matrices of a layer in parts, by the plan that transformers ships with its models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from lit_reason.errors import UserError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from lit_reason.models.language_model import LanguageModel

STYLES: dict[str, Any] = {"colwise": ColwiseParallel, "rowwise": RowwiseParallel}
CUT = ("num_attention_heads", "num_key_value_heads", "intermediate_size")  # sizes that are dealt out


def cut_matrices(lm: LanguageModel, mesh: DeviceMesh) -> None:
    """Give each process of a mesh its heads and its part of the feed-forward width (Megatron-LM, arXiv 1909.08053).

    Projections into heads and width are cut by rows of the weight, those out of them by columns; one sum over the
    processes follows each of the two blocks of a layer. Embedding, norms and output layer stay whole, and so do
    hidden states: what every process computes from them, dropout included, is equal on all.

    Args:
        lm: the model, whole.
        mesh: the tensor-parallel processes.

    Raises:
        UserError: the model has no plan of these two kinds of cuts, a size does not divide, or its layers are not
            plain matrices (adapters, low-rank factors).
    """
    if lm.config.adapter is not None or lm.config.lowrank is not None:
        raise UserError("strategy: tensor_parallel_size must be 1 with lm.adapter and lm.lowrank")
    base: Any = lm.base
    kind, text = type(base).__name__, base.config.get_text_config()
    plan = getattr(text, "base_model_tp_plan", None) or {}
    other = sorted({style for style in plan.values() if style not in STYLES})
    if not plan or other:
        has = f"one with {', '.join(other)}" if other else "none"
        raise UserError(
            f"strategy: tensor_parallel_size must be 1 for {kind}: a plan of {' and '.join(STYLES)} cuts is needed, "
            f"transformers has {has}"
        )
    for name in CUT:
        size = getattr(text, name, None)
        if size is not None and size % mesh.size():
            raise UserError(f"strategy: tensor_parallel_size {mesh.size()} does not divide {name} {size} of {kind}")
    parallelize_module(base.base_model, mesh, {name: STYLES[style]() for name, style in plan.items()})
