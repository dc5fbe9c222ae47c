"""Which modules of a language model hold their weights in shards, and when the shards are gathered."""

from __future__ import annotations

import types
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from lit_reason.errors import UserError
from lit_reason.models.adapters import decoder_layers
from lit_reason.strategies.tensor_parallel import cut_matrices

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from lit_reason.models.language_model import LanguageModel

# Gradients of bfloat16 weights are summed over processes in float32.
POLICY = MixedPrecisionPolicy(reduce_dtype=torch.float32)


def shard(lm: LanguageModel, device_mesh: DeviceMesh) -> None:
    """Keep one part of every weight on each data-parallel process (FSDP2, `fully_shard`).

    With a tensor-parallel dimension the layers' matrices are cut along that first, and each part then sharded.

    Each decoder layer gathers its weights while it runs. A separate output layer does so by itself; the loss calls
    it through its hooks. What is left (embedding, last norm, a tied output layer) belongs to the transformers model,
    is gathered when that starts to run, and stays gathered until the backward pass is over: the tied weight is
    needed again by the loss, after the backbone is done. Parameters become DTensors; their names stay.

    Args:
        lm: the model, whole, on any device; its weights move to the mesh's device one module after another.
        device_mesh: has dimensions `data_parallel` and `tensor_parallel`, as `ModelParallelStrategy` makes it.

    Raises:
        UserError: the model is quantised, or cannot be cut as the mesh wants it (`cut_matrices`).
    """
    if any(not p.is_floating_point() for p in lm.parameters()):
        raise UserError(
            "strategy: the weights of a quantised model cannot be sharded; use `trainer.strategy: ddp`, or set "
            "lm.adapter.quantize to none"
        )
    if device_mesh["tensor_parallel"].size() > 1:
        cut_matrices(lm, device_mesh["tensor_parallel"])
    mesh = device_mesh["data_parallel"]
    base: Any = lm.base
    for layer in decoder_layers(base):
        fully_shard(layer, mesh=mesh, mp_policy=POLICY)
    output, embedding = lm.head.layer, base.get_input_embeddings()
    if output.weight is not embedding.weight:
        fully_shard(output, mesh=mesh, mp_policy=POLICY)
    fully_shard(base, mesh=mesh, mp_policy=POLICY, reshard_after_forward=False)
    # Training runs the backbone alone, without the forward of the model around it, where the hooks are.
    base.run_backbone = types.MethodType(_run_backbone, base)
    register_fsdp_forward_method(base, "run_backbone")


def gather(lm: LanguageModel) -> LanguageModel | None:
    """A whole copy of a sharded model in the main memory of the first process. All processes call this together.

    Args:
        lm: the model, after `shard`.

    Returns:
        The copy, in training mode, on the first process; None on the others.
    """
    weights = get_model_state_dict(lm, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if torch.distributed.get_rank() != 0:
        return None
    config = lm.config
    if config.lowrank is not None:  # its first weights are replaced: spare their decomposition
        config = replace(config, lowrank=replace(config.lowrank, init="kaiming"))
    copy = type(lm).load(config)
    for name, adapter in getattr(lm.hf, "peft_config", {}).items():  # those that a regime added
        if name not in copy.hf.peft_config:  # type: ignore[operator]
            copy.hf.add_adapter(name, adapter)  # type: ignore[operator]
    copy.load_state_dict(weights)
    return copy


def _run_backbone(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return self.base_model(*args, **kwargs)  # type: ignore[operator]
