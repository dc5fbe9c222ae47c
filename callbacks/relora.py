"""ReLoRA: every so many steps the adapter is merged into its base and begins anew (arXiv 2307.05695)."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lit_reason.core.schedules import RESTARTING, restarts_at
from lit_reason.errors import UserError

MOMENTS = ("exp_avg", "exp_avg_sq")


class ReLoRA(Callback):
    """Adds up low-rank updates to one of high rank: `W += s B A`, A drawn anew, B zero, the adapter's moments pruned.

    The period is `optim.period_steps`; use the schedule `jagged_cosine`. Start from a model that was trained with all
    weights for a while, as the paper does (`lm.path`), and set `lm.adapter.train_rest`.

    Args:
        keep: share of the moments' entries that stay; the others become 0.
        by: which stay: drawn at `random`, or the largest by `magnitude`.

    Raises:
        UserError: the share is not between 0 and 1.
    """

    def __init__(self, keep: float = 0.001, by: Literal["random", "magnitude"] = "random") -> None:
        if not 0 <= keep <= 1:
            raise UserError(f"ReLoRA.keep is {keep}: a share of the optimizer's state, from 0 to 1")
        self.keep, self.by = keep, by
        self._step = 0
        self._count = 0
        self._bases: dict[str, Tensor] = {}  # as loaded from a checkpoint, until the model is there
        self._layers: dict[str, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        """The merged base weights, which no other part of a checkpoint holds, and the number of merges."""
        bases = {name: layer.base_layer.weight.detach() for name, layer in self._layers.items()} if self._count else {}
        return {"step": self._step, "count": self._count, "bases": bases}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from merged weights.

        Args:
            state_dict: what `state_dict` returned.
        """
        self._step, self._count, self._bases = state_dict["step"], state_dict["count"], state_dict["bases"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the adapter's layers.

        Raises:
            UserError: the model has no adapter, a quantised or sharded one, or there is no period.
        """
        from peft.tuners.lora import LoraLayer

        regime: Any = pl_module
        self._layers = {n: m for n, m in regime.lm.named_modules() if isinstance(m, LoraLayer)}
        if not self._layers:
            raise UserError("ReLoRA: the model has no adapter to merge; set lm.adapter")
        weights = [layer.base_layer.weight for layer in self._layers.values()]
        if any(isinstance(w, DTensor) or not w.is_floating_point() for w in weights):
            raise UserError("ReLoRA merges into whole, unquantised weights: leave out adapter.quantize and fsdp2")
        optim = regime.optim_config
        if not optim.period_steps or optim.schedule not in RESTARTING:
            raise UserError("ReLoRA: set optim.period_steps and optim.schedule: jagged_cosine")
        with torch.no_grad():
            for name, weight in self._bases.items():
                self._layers[name].base_layer.weight.copy_(weight)
        self._bases = {}

    @torch.no_grad()
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Merge, if an optimizer step has just been made and it is time."""
        regime: Any = pl_module
        if trainer.global_step == self._step:
            return  # a micro-batch within an optimizer step
        self._step = trainer.global_step
        if not restarts_at(self._step, int(trainer.estimated_stepping_batches), regime.optim_config):
            return
        source = torch.Generator().manual_seed(torch.initial_seed() % 2**32 + self._step)  # equal on all processes
        for layer in self._layers.values():
            merge(layer, source)
            for p in (*layer.lora_A.parameters(), *layer.lora_B.parameters()):
                self._prune(trainer.optimizers[0].state[p], source)
        self._count += 1
        regime.log("relora/merges", float(self._count), batch_size=1)

    def _prune(self, state: dict[str, Any], source: torch.Generator) -> None:
        unknown = sorted(state.keys() - {*MOMENTS, "step"})
        if unknown:
            raise UserError(f"ReLoRA: the optimizer keeps '{unknown[0]}', which cannot be pruned: use optimizer adamw")
        for name in MOMENTS:
            moment = state[name]
            if self.by == "random":
                stays = (torch.rand(moment.shape, generator=source) < self.keep).to(moment.device)
            else:
                stays = torch.zeros_like(moment, dtype=torch.bool)
                stays.view(-1)[moment.abs().flatten().topk(round(self.keep * moment.numel())).indices] = True
            moment.mul_(stays)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say how often the adapter was merged."""
        rank_zero_info(f"ReLoRA merged the adapter {self._count} times")


def merge(layer: Any, source: torch.Generator) -> None:
    """Add a layer's update to its base weight and start a new update at zero.

    Args:
        layer: of peft; its active adapters are merged.
        source: draws the new A, uniform within 1 / sqrt(inputs).
    """
    for adapter in layer.active_adapters:
        weight = layer.base_layer.weight
        weight.copy_(weight.float() + layer.get_delta_weight(adapter).float())
        fresh = torch.empty(layer.lora_A[adapter].weight.shape)
        nn.init.kaiming_uniform_(fresh, a=math.sqrt(5), generator=source)
        layer.lora_A[adapter].weight.copy_(fresh)
        layer.lora_B[adapter].weight.zero_()
