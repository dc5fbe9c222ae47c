"""The language-model head: hidden states in, loss or logits out; a loss never builds all logits.

Shapes: S supervised rows, D width, V vocabulary.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lit_reason.errors import UserError
from lit_reason.kernels.head_loss import HeadOut, linear_token_loss


class LossHead(nn.Module):
    """Computes the token loss through the model's own output layer.

    The output layer stays where transformers put it, so parameter names, tied embeddings and
    `save_pretrained` are those of the plain model. This module owns no parameter; it teaches the layer a
    second call, `lm_head(hidden, targets=..., token_weight=...)`, and uses it. The call goes through the
    layer's `__call__`, so hooks on the layer (sharded weights being gathered, for instance) fire as for
    logits.

    Args:
        model: a causal language model of transformers, without a peft wrapper around it.
    """

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        layer = _output_layer(model)
        layer.forward = types.MethodType(_logits_or_loss, layer)  # type: ignore[method-assign]
        self._layer = (layer,)  # a tuple, so that the layer is not registered a second time
        text = model.config.get_text_config()
        self.softcap: float | None = getattr(text, "final_logit_softcapping", None)
        self.scale = _logit_scale(text)

    @property
    def layer(self) -> nn.Linear:
        """The model's own output layer."""
        return self._layer[0]

    @property
    def weight(self) -> Tensor:
        """The output layer's weight, [V, D]."""
        return self._layer[0].weight

    def forward(
        self,
        hidden: Tensor,
        targets: Tensor | None = None,
        token_weight: Tensor | None = None,
        *,
        temperature: float = 1.0,
        **options: Any,
    ) -> HeadOut | Tensor:
        """Loss of some rows, or their logits.

        Args:
            hidden: last hidden states, [S, D] for a loss, [..., D] for logits.
            targets: token that each row must predict, [S]; None asks for logits.
            token_weight: loss weight of each row, [S]; default 1.
            temperature: divisor of the logits.
            **options: `chunk_rows` and `backend` of `linear_token_loss`.

        Returns:
            `HeadOut` for targets, else logits [..., V] as the model itself would return them.
        """
        layer = self._layer[0]
        if targets is None:
            logits = layer(hidden) * self.scale if self.scale != 1.0 else layer(hidden)
            if self.softcap is not None:
                logits = self.softcap * torch.tanh(logits / self.softcap)
            return logits / temperature if temperature != 1.0 else logits
        if self.scale != 1.0:
            # With a softcap the scale would belong inside it, not in the temperature; no model does both.
            temperature = temperature / self.scale
        options = {"temperature": temperature, "softcap": self.softcap, **options}
        return layer(hidden, targets=targets, token_weight=token_weight, **options)


def _logits_or_loss(
    self: nn.Linear,
    hidden: Tensor,
    targets: Tensor | None = None,
    token_weight: Tensor | None = None,
    **options: Any,
) -> HeadOut | Tensor:
    if targets is None:
        return type(self).forward(self, hidden)
    if token_weight is None:
        token_weight = torch.ones(targets.shape, dtype=torch.float32, device=hidden.device)
    return linear_token_loss(hidden, self.weight, targets, token_weight, bias=self.bias, **options)


def _output_layer(model: PreTrainedModel) -> nn.Linear:
    """The linear layer that makes logits; the trained copy where peft keeps one (`modules_to_save`)."""
    layer = model.get_output_embeddings()
    if layer is None:
        raise UserError(f"{type(model).__name__} has no output layer: a causal language model is needed")
    if hasattr(layer, "modules_to_save"):
        layer = layer.modules_to_save[layer.active_adapters[0]]
    if hasattr(layer, "base_layer"):
        raise UserError(
            "adapter.targets includes the output layer; a low-rank adapter there is not supported. "
            "Remove it from targets (`all-linear` leaves it out)"
        )
    if not isinstance(layer, nn.Linear) or not layer.weight.is_floating_point():
        raise UserError(f"the output layer is {type(layer).__name__}; an unquantised linear layer is needed")
    return layer


def _logit_scale(text: Any) -> float:
    """Factor on the logits after the output layer, as some families configure it."""
    for name in ("logit_scale", "lm_head_multiplier"):
        if getattr(text, name, None) is not None:
            return float(getattr(text, name))
    if getattr(text, "logits_scaling", None) is not None:
        return 1.0 / float(text.logits_scaling)
    return 1.0


@torch.no_grad()
def check_head(model: PreTrainedModel, head: LossHead) -> None:
    """Refuse a model whose own logits are not what `head` computes.

    The backbone's output is replaced by fixed hidden states that make logits near 30, large enough for a softcap
    or a scale to show.

    Args:
        model: the causal language model.
        head: its head.

    Raises:
        UserError: the architecture treats hidden states or logits in a way this head does not know.
    """
    weight = head.weight
    wave = torch.arange(4 * weight.shape[1], device=weight.device, dtype=torch.float32).sin().view(1, 4, -1)
    wave = wave.to(weight.dtype)
    wave = wave * (30 / (wave[0] @ weight.T).abs().max().clamp(min=1e-6))

    def replace(module: nn.Module, given: Any, output: Any) -> Any:
        output["last_hidden_state"] = wave
        return output

    hook = model.base_model.register_forward_hook(replace)
    try:
        ids = torch.zeros((1, 4), dtype=torch.long, device=weight.device)
        theirs = model(input_ids=ids, use_cache=False, return_dict=True).logits[0].float()
    finally:
        hook.remove()
    ours = head(wave[0]).float()
    allowed = torch.finfo(weight.dtype).eps ** 0.5 * float(theirs.abs().max())
    if theirs.shape != ours.shape or not float((theirs - ours).abs().max()) <= allowed:
        raise UserError(
            f"{type(model).__name__} changes hidden states or logits around its output layer in a way that "
            "the token loss does not know; this architecture is not supported yet"
        )
