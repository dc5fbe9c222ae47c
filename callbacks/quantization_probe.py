"""QuantizationProbe: does rounding the weights to 4 bits bring back what was forgotten?"""

from __future__ import annotations

from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from lit_reason.callbacks.relearn_probe import memory
from lit_reason.core.probe import need_scores, need_whole_weights, report, weights_put_back
from lit_reason.data.unlearning.rows import Role
from lit_reason.errors import UserError, did_you_mean

KINDS = ("nf4", "fp4")


class QuantizationProbe(Callback):
    """After training, rounds the linear layers to 4 bits and reports what the model remembers then.

    Small changes of weights, as unlearning makes them, can be lost in rounding, and the memory returns (arXiv
    2410.16454). An adapter is merged first. Logs `probe/quantized_loss_before`, `_after` (mean loss of the rows to
    forget), `_memory_before` and `_after` (mean of the forget scores, token by token), and writes `quantized.json`. The
    weights are put back.

    Args:
        kind: `nf4` or `fp4`, in blocks of 64 weights, by bitsandbytes (extra `quant`).
    """

    def __init__(self, kind: Literal["nf4", "fp4"] = "nf4") -> None:
        if kind not in KINDS:
            raise UserError(f"QuantizationProbe.kind is {kind!r}; it is nf4 or fp4{did_you_mean(kind, KINDS)}")
        self.kind = kind

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find out before training that the probe cannot run.

        Raises:
            UserError: nothing to measure by, weights in shards, or no bitsandbytes.
        """
        need_scores(pl_module, "QuantizationProbe")
        need_whole_weights(pl_module, "QuantizationProbe")
        _functional()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Run the probe."""
        module: Any = pl_module
        numbers = trainer.datamodule.store.numbers(Role.FORGET).tolist()  # type: ignore[attr-defined]
        before = memory(module, numbers)
        with weights_put_back(pl_module):
            adapted = hasattr(module.lm.hf, "merge_adapter")
            if adapted:
                module.lm.hf.merge_adapter()
            self.round(module.lm.base)
            after = memory(module, numbers)
            if adapted:
                module.lm.hf.unmerge_adapter()  # the weights themselves are put back from their copy
        figures = {
            "loss_before": before[0],
            "loss_after": after[0],
            "memory_before": before[1],
            "memory_after": after[1],
        }
        report(trainer, "quantized", figures)

    @torch.no_grad()
    def round(self, model: nn.Module) -> int:
        """Replace the weights of all linear layers but the head by what 4 bits keep of them.

        Args:
            model: a transformers model.

        Returns:
            How many layers were rounded.
        """
        bnb: Any = _functional()
        head: Any = model.get_output_embeddings()  # type: ignore[operator]
        kept_away = {id(head), id(getattr(head, "base_layer", head))}
        count = 0
        for name, layer in model.named_modules():
            if isinstance(layer, nn.Linear) and id(layer) not in kept_away and "lora_" not in name:
                packed, state = bnb.quantize_4bit(layer.weight.data.contiguous(), quant_type=self.kind)
                layer.weight.copy_(bnb.dequantize_4bit(packed, state).to(layer.weight.dtype))
                count += 1
        return count


def _functional() -> Any:
    try:
        import bitsandbytes.functional as functional
    except ImportError as error:
        raise UserError("QuantizationProbe needs bitsandbytes: pip install 'lit-reason[quant]'") from error
    return functional
