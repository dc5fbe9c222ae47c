"""The language-model head: hidden states in, loss or logits out; a loss never builds all logits.

Shapes: S supervised rows, D width, V vocabulary.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from lit_reason.errors import UserError
from lit_reason.kernels.divergence import DivergenceOut, linear_divergence
from lit_reason.kernels.head_loss import HeadOut, linear_token_loss
from lit_reason.kernels.token_logprobs import TokenStats, token_logprobs


class LossHead(nn.Module):
    """Computes token losses and log-probabilities through the model's own output layer.

    The output layer stays where transformers put it, so parameter names, tied embeddings and
    `save_pretrained` are those of the plain model. This module owns no parameter; it teaches the layer a
    second call, `lm_head(hidden, op, ...)`, and uses it. The call goes through the layer's `__call__`, so hooks on
    the layer (sharded weights being gathered, for instance) fire as for logits.

    A low-rank adapter on the output layer joins as more columns: with logits x W^T + s (x A^T) B^T, the operations
    are given the rows [x, s x A^T] and the head [W, B]. That is exact, in the dtype of W, and costs a copy of the head.

    Args:
        model: a causal language model of transformers, without a peft wrapper around it.
    """

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        layer = _output_layer(model)
        layer.forward = types.MethodType(_logits_or_op, layer)  # type: ignore[method-assign]
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
            **options: others of `linear_token_loss`: `loss`, `index_S`, `hidden_ref_SD` and so on. An adapter on the
                output layer is left out for the rows of a reference.

        Returns:
            `HeadOut` for targets, else logits [..., V] as the model itself would return them.
        """
        if targets is None:
            layer = self._layer[0]
            logits = layer(hidden) * self.scale if self.scale != 1.0 else layer(hidden)
            if self.softcap is not None:
                logits = self.softcap * torch.tanh(logits / self.softcap)
            return logits / temperature if temperature != 1.0 else logits
        if token_weight is None:
            token_weight = torch.ones(targets.shape, dtype=torch.float32, device=hidden.device)
        return self._run(linear_token_loss, hidden, targets, token_weight, temperature=temperature, **options)

    def token_logprobs(
        self, hidden: Tensor, targets: Tensor, *, temperature: float = 1.0, **options: Any
    ) -> TokenStats:
        """Log-probability, entropy and hit of tokens, for losses that need them all before they know a gradient.

        Args:
            hidden: last hidden states, [S, D].
            targets: token of each row, [S].
            temperature: divisor of the logits.
            **options: others of `token_logprobs`, such as `index_S`.
        """
        return self._run(token_logprobs, hidden, targets, temperature=temperature, **options)

    def divergence(
        self, hidden: Tensor, hidden_ref: Tensor, token_weight: Tensor, *, kind: str, reference: LossHead | None = None
    ) -> DivergenceOut:
        """Divergence from a reference policy, summed over rows, without logits of `[S, V]`.

        Args:
            hidden: last hidden states, [S, D].
            hidden_ref: those of the reference, [S, D].
            token_weight: weight of each row, [S].
            kind: of `linear_divergence`: `fkl` is KL(reference, policy), `rkl` KL(policy, reference).
            reference: the reference's head; None where it is this one without its adapter.
        """
        other = None if reference is None or reference is self else (reference.weight, reference.layer.bias)
        return self._run(
            _divergence, hidden, token_weight, temperature=1.0, hidden_ref_SD=hidden_ref, other=other, kind=kind
        )

    def _run(self, op: Callable[..., Any], hidden: Tensor, *args: Tensor, temperature: float, **options: Any) -> Any:
        # With a softcap the scale would belong inside it, not in the temperature; no model does both.
        options = {"temperature": temperature / self.scale, "softcap": self.softcap, **options}
        return self._layer[0](hidden, op, *args, **options)


def _logits_or_op(
    self: nn.Linear, hidden: Tensor, op: Callable[..., Any] | None = None, *args: Tensor, **options: Any
) -> Any:
    if op is None:
        return type(self).forward(self, hidden)
    head = getattr(self, "base_layer", self)
    ref, bias = options.pop("hidden_ref_SD", None), head.bias
    hidden, weight, ref = _with_adapter(self, hidden, head.weight, ref)
    if ref is not None:
        options["hidden_ref_SD"] = ref
    return op(hidden, weight, *args, bias=bias, **options)


def _divergence(
    hidden: Tensor,
    weight: Tensor,
    token_weight: Tensor,
    *,
    bias: Tensor | None,
    hidden_ref_SD: Tensor,
    other: tuple[Tensor, Tensor | None] | None,
    softcap: float | None,
    **options: Any,
) -> DivergenceOut:
    weight_ref, bias_ref = (weight, bias) if other is None else other
    if other is not None:
        hidden_ref_SD = hidden_ref_SD[:, : weight_ref.shape[1]]  # without the zeros beside an adapter's columns
    caps = {"softcap_s": softcap, "softcap_t": softcap}
    teacher = (hidden_ref_SD.detach(), weight_ref.detach())
    return linear_divergence(hidden, weight, *teacher, token_weight, bias_s=bias, bias_t=bias_ref, **caps, **options)


def _with_adapter(
    layer: Any, hidden: Tensor, weight: Tensor, ref: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Rows and head with the active adapters' columns; a reference has zeros there."""
    if layer is getattr(layer, "base_layer", layer) or layer.disable_adapters:
        return hidden, weight, ref
    rows, columns = [hidden], [weight]
    for name in layer.active_adapters:
        down, up = layer.lora_A[name].weight, layer.lora_B[name].weight
        middle = layer.scaling[name] * F.linear(layer.lora_dropout[name](hidden).to(down.dtype), down)
        rows.append(middle.to(hidden.dtype))
        columns.append(up.to(weight.dtype))
    hidden = torch.cat(rows, -1)
    if ref is not None:
        ref = F.pad(ref, (0, hidden.shape[-1] - ref.shape[-1]))
    return hidden, torch.cat(columns, -1), ref


def _output_layer(model: PreTrainedModel) -> nn.Linear:
    """The linear layer that makes logits; the trained copy where peft keeps one (`modules_to_save`)."""
    layer: Any = model.get_output_embeddings()
    if layer is None:
        raise UserError(f"{type(model).__name__} has no output layer: a causal language model is needed")
    if hasattr(layer, "modules_to_save"):
        layer = layer.modules_to_save[layer.active_adapters[0]]
    inner = getattr(layer, "base_layer", layer)
    if inner is not layer:
        plain = hasattr(layer, "lora_A") and not getattr(layer, "lora_variant", None)
        if not plain or any(up.bias is not None for up in layer.lora_B.values()):
            raise UserError("the adapter on the output layer is not a plain LoRA; remove the layer from its targets")
    if not isinstance(inner, nn.Linear) or not inner.weight.is_floating_point():
        raise UserError(f"the output layer is {type(inner).__name__}; an unquantised linear layer is needed")
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
