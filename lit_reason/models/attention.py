"""Attention over packed rows: several documents laid end to end in one row, none seeing another.

Shapes: T packed tokens, N documents, B batch, H heads, K key/value heads, L queries, M keys, d head width.

Two back ends are added to transformers' attention interface, so model code stays untouched:

* `documents` runs scaled-dot-product attention once per document. It costs the sum of the squared lengths and
  builds no mask, which on a CPU is about four times cheaper than one call with a block mask.
* `varlen` runs `torch.nn.attention.varlen` (flash attention with cumulative lengths) on CUDA.

Both fall back to transformers' own SDPA when the model is called without packing, as `generate` does with
padding and a key/value cache. `sdpa`, `eager` and `flex` are transformers' own; it builds their block mask
from position ids that restart.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lit_reason.errors import UserError

TRANSFORMERS_NAME = {"flex": "flex_attention"}
UNDERSTOOD_LAYERS = {"full_attention", "sliding_attention"}
NO_SOFTCAP = "has no score softcap, which this model uses"

_packed: ContextVar[bool] = ContextVar("lit_reason_packed", default=False)


@contextmanager
def packed_rows() -> Iterator[None]:
    """Inside, model calls are packed: no mask is built, and attention must be given the boundaries."""
    token = _packed.set(True)
    try:
        yield
    finally:
        _packed.reset(token)


def packing_arguments(backend: str, cu_seqlens: Tensor, device: torch.device) -> dict[str, Any]:
    """Keyword arguments that carry the document boundaries through a transformers model to its attention.

    Args:
        backend: resolved attention back end.
        cu_seqlens: cumulative document lengths, [N + 1], starting at 0. Keep it on the CPU if you can: on a
            GPU, reading it waits for the device once per call.
        device: where the model runs.
    """
    if backend not in ("documents", "varlen"):
        return {}
    on_cpu = cu_seqlens.to("cpu", torch.int32)
    if backend == "documents":
        return {"cu_seq_lens_q": on_cpu, "cu_seq_lens_k": on_cpu}
    longest = int(on_cpu.diff().max())
    on_device = cu_seqlens.to(device, torch.int32)
    lengths = {"max_length_q": longest, "max_length_k": longest}
    return {"cu_seq_lens_q": on_device, "cu_seq_lens_k": on_device, **lengths}


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """Mask of the added back ends: none for packed rows, transformers' SDPA mask otherwise."""
    return None if _packed.get() else sdpa_mask(*args, **kwargs)


def _boundaries_missing(module: nn.Module, name: str) -> UserError:
    return UserError(
        f"attention '{name}': {type(module).__name__} does not hand document boundaries to its attention; "
        "use attention 'sdpa' or 'eager' for this model"
    )


def _window(module: nn.Module, kwargs: dict[str, Any], name: str) -> int | None:
    """Sliding window of this layer in tokens, the query's own included; None for full attention."""
    for unknown in ("s_aux", "position_bias"):
        if kwargs.get(unknown) is not None:
            raise UserError(f"attention '{name}' does not know {type(module).__name__}'s `{unknown}`; use 'eager'")
    kinds = getattr(getattr(module, "config", None), "layer_types", None) or ()
    index = getattr(module, "layer_idx", None)
    window = kwargs.get("sliding_window")
    if index is not None and index < len(kinds) and kinds[index] == "sliding_attention" and window is None:
        raise UserError(f"attention '{name}': {type(module).__name__} does not pass its sliding window; use 'sdpa'")
    return window


def _repeat_heads(x: Tensor, heads: int) -> Tensor:
    """[B, K, L, d] -> [B, heads, L, d], each key/value head repeated for its group of queries."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    cap: float | None,
    dropout: float,
) -> Tensor:
    """Attention of q [B, H, L, d] over k, v [B, K, M, d]; boolean mask, True where a key is seen."""
    # On a CPU, SDPA takes fewer key/value heads as they are, in two thirds of the time.
    if cap is not None or q.device.type != "cpu":
        k, v = _repeat_heads(k, q.shape[1]), _repeat_heads(v, q.shape[1])
    if cap is None:
        return F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            dropout_p=dropout,
            is_causal=causal and mask is None,
            scale=scale,
            enable_gqa=k.shape[1] != q.shape[1],
        )
    scores = cap * torch.tanh(q @ k.transpose(-1, -2) * (scale / cap))
    if causal and mask is None:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    p = torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    return F.dropout(p, dropout) @ v


def _unpacked(module, query, key, value, mask, dropout, scaling, kwargs) -> tuple[Tensor, None]:
    """An ordinary batch: padded training or generation with a cache."""
    cap = kwargs.pop("softcap", None)
    if cap is None:
        return sdpa_attention_forward(module, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs)
    causal = query.shape[2] > 1 and getattr(module, "is_causal", True)
    out = _attend(query, key, value, mask, causal, scaling, cap, dropout)
    return out.transpose(1, 2).contiguous(), None


@torch.compiler.disable
def documents_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention inside each document of one packed row.

    Args:
        module: the attention layer that calls.
        query: [B, H, L, d]; B is 1 when packed.
        key: [B, K, M, d].
        value: [B, K, M, d].
        attention_mask: ignored for packed rows; else boolean [B, 1, L, M], True where a key is seen, or None.
        dropout: probability of dropping an attention weight.
        scaling: factor on the scores; default d ** -0.5.
        **kwargs: `cu_seq_lens_q` [N + 1] marks a packed row; `sliding_window`, `softcap` as transformers
            passes them.

    Returns:
        Attention output [B, L, H, d], and None for the weights.
    """
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    boundaries = kwargs.pop("cu_seq_lens_q", None)
    if boundaries is None:
        if _packed.get():
            raise _boundaries_missing(module, "documents")
        return _unpacked(module, query, key, value, attention_mask, dropout, scaling, kwargs)
    window = _window(module, kwargs, "documents")
    causal = getattr(module, "is_causal", True)
    edges = boundaries.tolist()
    lengths = [end - start for start, end in pairwise(edges)]
    parts = []
    # Split, not sliced: the gradient of a slice is as large as the whole row, once for every document.
    for q, k, v in zip(*(x.split(lengths, dim=2) for x in (query, key, value)), strict=True):
        band = None
        if causal and window is not None and q.shape[2] > window:
            offset = torch.arange(q.shape[2], device=query.device)
            offset = offset[:, None] - offset
            band = (offset >= 0) & (offset < window)
        out = _attend(q, k, v, band, causal, scaling, kwargs.get("softcap"), dropout)
        parts.append(out.transpose(1, 2))
    return torch.cat(parts, dim=1), None


def varlen_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """`documents_attention` in one flash-attention call: CUDA, bfloat16 or float16, no dropout.

    Tensors on another device (a model that has not moved to its GPU yet) go through `documents_attention`.
    """
    boundaries = kwargs.get("cu_seq_lens_q")
    if boundaries is None and _packed.get():
        raise _boundaries_missing(module, "varlen")
    if boundaries is None or query.device.type != "cuda":
        return documents_attention(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    if dropout or kwargs.get("softcap") is not None:
        raise UserError("attention 'varlen' has no dropout and no score softcap; use attention 'documents'")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    window, causal = _window(module, kwargs, "varlen"), getattr(module, "is_causal", True)
    return _varlen(query, key, value, boundaries, kwargs["max_length_q"], window, causal, scaling), None


def _varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    edges: Tensor,
    longest: int,
    window: int | None,
    causal: bool,
    scale: float,
) -> Tensor:
    """[1, H, T, d] and [1, K, T, d] to [1, T, H, d] by torch's kernel, whose arguments differ between releases."""
    from torch.nn.attention.varlen import varlen_attn

    heads = query.shape[1]
    q, k, v = (x[0].transpose(0, 1) for x in (query, _repeat_heads(key, heads), _repeat_heads(value, heads)))
    known = inspect.signature(varlen_attn).parameters
    options: dict[str, Any] = {}
    if "scale" in known:
        options["scale"] = scale
    else:
        q = q * (scale * query.shape[-1] ** 0.5)
    if "window_size" in known:
        options["window_size"] = ((-1 if window is None else window - 1), 0) if causal else (-1, -1)
    elif window is None or longest <= window:
        options["is_causal"] = causal
    else:
        raise UserError(f"attention 'varlen' of torch {torch.__version__} has no sliding window; use 'documents'")
    return varlen_attn(q, k, v, edges, edges, longest, longest, **options).unsqueeze(0)  # type: ignore[union-attr]


for _name, _function in (("documents", documents_attention), ("varlen", varlen_attention)):
    AttentionInterface.register(_name, _function)
    AttentionMaskInterface.register(_name, _mask)


def set_attention(model: PreTrainedModel, wanted: str) -> str:
    """Choose and switch on an attention back end.

    Args:
        model: the causal language model.
        wanted: a back end of `ModelConfig.attention`; `auto` takes `varlen` where it runs, else `documents`,
            else transformers' `sdpa` or `eager` for models that these two cannot serve.

    Returns:
        The resolved name: `documents`, `varlen`, `sdpa`, `eager` or `flex`.

    Raises:
        UserError: this model, device or torch cannot run the back end.
    """
    text = model.config.get_text_config()
    on_cuda = torch.cuda.is_available()
    reasons = _obstacles(model, text, on_cuda)
    if wanted == "auto":
        choice = next(name for name in ("varlen", "documents", "sdpa", "eager") if not reasons.get(name))
    else:
        choice = wanted
    if reasons.get(choice):
        usable = [n for n in ("varlen", "documents", "sdpa", "flex", "eager") if not reasons.get(n)]
        raise UserError(f"attention '{choice}': {reasons[choice]}; usable here: {', '.join(usable)}")
    name = TRANSFORMERS_NAME.get(choice, choice)
    if model.config._attn_implementation != name:
        model.set_attn_implementation(name)
    return choice


def _obstacles(model: PreTrainedModel, text: Any, on_cuda: bool) -> dict[str, str]:
    """Why a back end cannot be used with this model here, by name; absent where it can."""
    cap = getattr(text, "attn_logit_softcapping", None)
    kinds = set(getattr(text, "layer_types", None) or ())
    reasons: dict[str, str] = {}
    if not getattr(model, "_supports_attention_backend", False):
        reasons["documents"] = f"{type(model).__name__} does not use transformers' attention interface"
    elif kinds - UNDERSTOOD_LAYERS:
        reasons["documents"] = f"layers of kind {sorted(kinds - UNDERSTOOD_LAYERS)} need a mask"
    if "documents" in reasons:
        reasons["varlen"] = reasons["documents"]
    elif not on_cuda:
        reasons["varlen"] = "needs a CUDA device"
    elif model.dtype not in (torch.bfloat16, torch.float16):
        reasons["varlen"] = f"needs bfloat16 or float16, the model is {model.dtype}"
    elif cap is not None:
        reasons["varlen"] = NO_SOFTCAP
    else:
        try:
            from torch.nn.attention.varlen import varlen_attn  # noqa: F401
        except ImportError:
            reasons["varlen"] = f"torch {torch.__version__} does not have it"
    if not getattr(model, "_supports_sdpa", False):
        reasons["sdpa"] = f"{type(model).__name__} does not support it"
    elif cap is not None:  # transformers 5.17 lets it through, and leaves the cap out
        reasons["sdpa"] = NO_SOFTCAP
    if not on_cuda:
        reasons["flex"] = "its backward pass needs a CUDA device"
    elif not getattr(model, "_supports_flex_attn", False):
        reasons["flex"] = f"{type(model).__name__} does not support it"
    return reasons
