"""Weighted negative log-likelihood of a language-model head that never holds `[tokens, vocabulary]`.

Shapes: S supervised rows, D width, V vocabulary, r rows of one chunk.

The product with the head, the softmax and the gradient of one chunk of rows are finished before the next
chunk starts, in buffers allocated once, so memory is `chunk_rows * V` instead of `S * V` and the logits are
computed once (6 S V D floating-point operations for forward and backward together). This works because the loss is a
plain weighted sum: the derivative of each row is known as soon as its logits are.

Layout for growth: `_chunked` owns the loop and the matrix products; `_nll_rows` turns logits into d-logits in
place for some rows and is the only place that knows the loss. A faster row pass (Triton) or another loss
replaces `_nll_rows` and nothing else.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lit_reason.errors import UserError, did_you_mean

BACKENDS = ("auto", "torch", "reference")
ROWS_ON_CPU = 512
CUDA_CHUNK_BYTES = 2**30
SCRATCH_BYTES_ON_CPU = 8 * 2**20  # stays in the cache
SCRATCH_BYTES = 256 * 2**20


class HeadOut(NamedTuple):
    """Loss and statistics of the supervised rows; only `loss_sum` carries a gradient.

    Args:
        loss_sum: scalar, sum over rows of `-token_weight * logp`.
        logp_S: natural log-probability of each target under the (softcapped, tempered) distribution.
        entropy_S: entropy of that distribution in nats.
        hit_S: whether the target is the first of the largest logits.
    """

    loss_sum: Tensor
    logp_S: Tensor
    entropy_S: Tensor
    hit_S: Tensor


def linear_token_loss(
    hidden_SD: Tensor,
    weight_VD: Tensor,
    targets_S: Tensor,
    token_weight_S: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    chunk_rows: int | None = None,
    backend: str = "auto",
) -> HeadOut:
    """Sum of weighted negative log-likelihoods of `softmax(cap(hidden weight^T + bias) / temperature)`.

    `cap(z) = softcap * tanh(z / softcap)`. The caller folds every divisor (tokens of the batch, for instance)
    into `token_weight_S`; that keeps gradient accumulation and data parallelism exact. Gradients reach
    `hidden_SD`, `weight_VD`, `bias` and `token_weight_S`, each only if it asks for one; a second backward
    through the same result is refused because the buffers are handed over in the first.

    Args:
        hidden_SD: rows to predict from, [S, D], any floating dtype; S may be 0.
        weight_VD: head weight, [V, D]. Its dtype is the dtype of the products, or autocast's where that is
            on.
        targets_S: token to predict per row, [S], integers in [0, V).
        token_weight_S: weight per row, [S]; zero and negative weights are allowed.
        bias: head bias, [V].
        temperature: positive divisor of the logits.
        softcap: positive bound of the logits before the temperature, or None.
        chunk_rows: rows per chunk; None takes 512 on a CPU and about 1 GiB of logits on a GPU.
        backend: `torch` is the chunked path, `reference` materialises all logits (for tests), `auto` is
            `torch` unless the environment variable LIT_REASON_KERNELS names another.

    Returns:
        Loss and per-row statistics, float32 (float64 for float64 inputs).

    Raises:
        UserError: an argument has a wrong shape, dtype or value; the message names it.
    """
    _check(hidden_SD, weight_VD, targets_S, token_weight_S, bias, temperature, softcap, chunk_rows)
    device = hidden_SD.device.type
    compute = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight_VD.dtype
    if weight_VD.dtype == torch.float64:
        compute = torch.float64
    stats = torch.float64 if compute == torch.float64 else torch.float32
    weights = token_weight_S.to(stats)
    shape = _Shape(1.0 / temperature, softcap, compute, stats)
    with torch.autocast(device, enabled=False):
        if _resolve(backend) == "reference":
            return _reference(hidden_SD, weight_VD, targets_S, weights, bias, shape)
        rows = chunk_rows or _chunk_rows(weight_VD.shape[0], hidden_SD.device, compute)
        inputs = (hidden_SD, weight_VD, weights, bias)
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
            return HeadOut(*_TokenLoss.apply(*inputs, targets_S, shape, rows))
        return _chunked(*inputs, targets_S, shape, rows, (False, False, False))[0]


class _Shape(NamedTuple):
    """How logits become a distribution, and in which dtypes."""

    inverse_temperature: float
    softcap: float | None
    compute: torch.dtype
    stats: torch.dtype


def _reference(hidden, weight, targets, token_weight, bias, shape: _Shape) -> HeadOut:
    """All logits at once, differentiated by autograd: the formula in its plainest form."""
    z = F.linear(hidden.to(shape.compute), weight.to(shape.compute)).to(shape.stats)
    if bias is not None:
        z = z + bias.to(shape.stats)
    if shape.softcap is not None:
        z = shape.softcap * torch.tanh(z / shape.softcap)
    log_p = torch.log_softmax(z * shape.inverse_temperature, dim=-1)
    logp = log_p.gather(1, targets.long()[:, None])[:, 0]
    entropy = -(log_p.exp() * log_p).sum(-1)
    hit = z.argmax(-1) == targets
    return HeadOut(-(token_weight * logp).sum(), logp.detach(), entropy.detach(), hit)


class _TokenLoss(torch.autograd.Function):
    """Computes the gradient during the forward pass and hands it over in the backward pass."""

    @staticmethod
    def forward(ctx, hidden, weight, token_weight, bias, targets, shape, rows):
        wanted = (ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[3])
        out, grads = _chunked(hidden, weight, token_weight, bias, targets, shape, rows, wanted)
        ctx.grads = grads
        ctx.mark_non_differentiable(out.logp_S, out.entropy_S, out.hit_S)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(out.logp_S)
        return tuple(out)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream, *_):
        (logp,) = ctx.saved_tensors
        if ctx.grads is None:
            raise RuntimeError("linear_token_loss: backward ran twice; its gradients are handed over in the first")
        grads, ctx.grads = ctx.grads, None
        if upstream is None:
            return (None,) * 7
        # Reading the upstream factor costs nothing on a CPU; on a GPU it would wait for the device.
        if upstream.device.type != "cpu" or upstream.item() != 1.0:
            for grad in grads:
                if grad is not None:
                    grad.mul_(upstream)
        d_hidden, d_weight, d_bias = grads
        d_token_weight = logp.mul(-upstream) if ctx.needs_input_grad[2] else None
        return d_hidden, d_weight, d_token_weight, d_bias, None, None, None


def _chunked(
    hidden: Tensor,
    weight: Tensor,
    token_weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    shape: _Shape,
    rows: int,
    wanted: tuple[bool, bool, bool],
) -> tuple[HeadOut, tuple[Tensor | None, Tensor | None, Tensor | None]]:
    """Loop over chunks of rows; `wanted`: gradients of hidden, weight and bias that are needed."""
    want_hidden, want_weight, want_bias = wanted
    (S, D), V, device = hidden.shape, weight.shape[0], hidden.device
    w = weight.detach().to(shape.compute)
    rows = math.ceil(S / math.ceil(S / rows)) if S else 1  # equal chunks instead of a small last one
    new = hidden.new_empty
    logits = new((rows, V), dtype=shape.compute)
    logp, entropy = (new(S, dtype=shape.stats) for _ in range(2))
    hit = new(S, dtype=torch.bool)
    d_hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format) if want_hidden else None
    d_bias = torch.zeros(V, dtype=shape.stats, device=device) if want_bias else None
    add_weight, d_weight = _weight_sum(V, D, shape, device) if want_weight else (None, None)
    row_pass = _RowPass(shape, bias, V, device, any(wanted))
    for start in range(0, S, rows):
        part = slice(start, min(start + rows, S))
        x = hidden[part].detach().to(shape.compute)
        z = logits[: x.shape[0]]
        torch.mm(x, w.t(), out=z)
        row_pass(z, targets[part], token_weight[part], logp[part], entropy[part], hit[part])
        if d_hidden is not None:
            if d_hidden.dtype == shape.compute:
                torch.mm(z, w, out=d_hidden[part])
            else:
                d_hidden[part] = torch.mm(z, w)
        if add_weight is not None:
            add_weight(z, x)
        if d_bias is not None:
            d_bias.add_(z.sum(0, dtype=shape.stats))
    out = HeadOut(-(token_weight.detach() * logp).sum(), logp, entropy, hit)
    if d_weight is not None:
        d_weight = d_weight.to(weight.dtype)
    if d_bias is not None and bias is not None:
        d_bias = d_bias.to(bias.dtype)
    return out, (d_hidden, d_weight, d_bias)


class _RowPass:
    """Applies `_nll_rows` in blocks of rows and holds the scratch memory for it."""

    def __init__(self, shape: _Shape, bias: Tensor | None, V: int, device: torch.device, want_grad: bool):
        self.shape, self.want_grad = shape, want_grad
        self.bias = None if bias is None else bias.detach().to(shape.stats)
        self.V, self.device = V, device
        self.scratch: list[Tensor] = []

    def __call__(self, z, targets, token_weight, logp, entropy, hit) -> None:
        """Fill logp, entropy and hit for the logits z [r, V]; with gradients wanted, turn z into d-logits."""
        budget = SCRATCH_BYTES_ON_CPU if self.device.type == "cpu" else SCRATCH_BYTES
        block = max(1, min(z.shape[0], budget // (4 * self.V)))
        if not self.scratch:
            buffers = 1 + (self.shape.compute != self.shape.stats) + (self.shape.softcap is not None)
            self.scratch = [
                torch.empty((block, self.V), dtype=self.shape.stats, device=self.device) for _ in range(buffers)
            ]
        for start in range(0, z.shape[0], block):
            part = slice(start, start + block)
            rows = (
                z[part],
                targets[part].long(),
                token_weight[part].detach(),
                logp[part],
                entropy[part],
                hit[part],
            )
            _nll_rows(*rows, self.bias, self.shape, self.scratch, self.want_grad)


def _nll_rows(logits, targets, token_weight, logp, entropy, hit, bias, shape: _Shape, scratch, want_grad) -> None:
    """Statistics of some rows and, in place of their logits, the gradient of `-token_weight * logp`.

    With p the softmax, m the largest logit and s the sum of exp(z - m): logp = z_y - m - log s; entropy is
    log s - sum(exp(z - m) (z - m)) / s, the shifted form, which does not subtract two numbers of the size of
    the logits; d logit = token_weight / temperature * (p - onehot) * (1 - tanh^2).
    """
    r = logits.shape[0]
    free = [buffer[:r] for buffer in scratch]
    z = logits if logits.dtype == shape.stats else free.pop().copy_(logits)
    if bias is not None:
        z.add_(bias)
    slope = None
    if shape.softcap is not None:
        z.div_(shape.softcap).tanh_()
        if want_grad:
            slope = torch.mul(z, z, out=free.pop()).neg_().add_(1.0)
        z.mul_(shape.softcap)
    if shape.inverse_temperature != 1.0:
        z.mul_(shape.inverse_temperature)
    # A column masked with -inf becomes a number whose exponential is exactly 0: no inf - inf and no 0 * inf
    # below.
    z.clamp_(min=torch.finfo(z.dtype).min / 2)
    largest, first = z.max(dim=-1)
    torch.eq(first, targets, out=hit)
    z.sub_(largest[:, None])
    e = torch.exp(z, out=free.pop())
    total = e.sum(-1)
    log_total = total.log()
    torch.sub(z.gather(1, targets[:, None])[:, 0], log_total, out=logp)
    shifted = z.mul_(e).sum(-1)
    torch.sub(log_total, shifted.div_(total), out=entropy).clamp_(min=0.0)
    if not want_grad:
        return
    scale = token_weight * shape.inverse_temperature
    torch.mul(e, (scale / total)[:, None], out=z)
    z.scatter_add_(1, targets[:, None], -scale[:, None])
    if slope is not None:
        z.mul_(slope)
    if z is not logits:
        logits.copy_(z)


def _weight_sum(
    V: int, D: int, shape: _Shape, device: torch.device
) -> tuple[Callable[[Tensor, Tensor], Tensor], Tensor]:
    """A function that adds `dlogits^T x` of a chunk, and the total it adds to, kept in float32 or wider.

    Rounding the total to bfloat16 after every chunk would bias training.
    """
    total = torch.zeros((V, D), dtype=shape.stats, device=device)
    if shape.compute == shape.stats:
        return (lambda dz, x: total.addmm_(dz.t(), x)), total
    if device.type == "cuda":
        return (lambda dz, x: total.add_(torch.mm(dz.t(), x, out_dtype=shape.stats))), total
    product = torch.empty((V, D), dtype=shape.compute, device=device)
    return (lambda dz, x: total.add_(torch.mm(dz.t(), x, out=product))), total


def _chunk_rows(V: int, device: torch.device, dtype: torch.dtype) -> int:
    """Rows per chunk: few on a CPU to save memory, on a GPU enough to keep the products near peak."""
    if device.type != "cuda":
        return ROWS_ON_CPU
    rows = CUDA_CHUNK_BYTES // (V * torch.finfo(dtype).bits // 8) // 128 * 128
    return min(max(rows, 1024), 8192)


def _resolve(backend: str) -> str:
    source = "backend"
    if backend == "auto" and (forced := os.environ.get("LIT_REASON_KERNELS")):
        backend, source = forced, "LIT_REASON_KERNELS"
    if backend not in BACKENDS:
        hint = did_you_mean(backend, BACKENDS)
        raise UserError(f"linear_token_loss: {source} is '{backend}'; allowed: {', '.join(BACKENDS)}{hint}")
    return "torch" if backend == "auto" else backend


def _check(hidden, weight, targets, token_weight, bias, temperature, softcap, chunk_rows) -> None:
    """Refuse wrong arguments by name; looks at target values only where that costs no wait for a device."""

    def need(ok: bool, name: str, given: object, allowed: str) -> None:
        if not ok:
            raise UserError(f"linear_token_loss: {name} is {given}; it must be {allowed}")

    need(hidden.ndim == 2, "hidden_SD", f"of shape {tuple(hidden.shape)}", "[S, D]")
    S, D = hidden.shape
    need(weight.ndim == 2 and weight.shape[1] == D, "weight_VD", f"of shape {tuple(weight.shape)}", f"[V, {D}]")
    V = weight.shape[0]
    for name, tensor in (("hidden_SD", hidden), ("weight_VD", weight), ("token_weight_S", token_weight)):
        need(tensor.is_floating_point(), name, f"of dtype {tensor.dtype}", "a floating-point tensor")
    for name, tensor in (("targets_S", targets), ("token_weight_S", token_weight)):
        need(tensor.shape == (S,), name, f"of shape {tuple(tensor.shape)}", f"[{S}], one entry per hidden row")
    need(
        targets.dtype in (torch.int64, torch.int32),
        "targets_S",
        f"of dtype {targets.dtype}",
        "int64 or int32",
    )
    if bias is not None:
        need(bias.shape == (V,), "bias", f"of shape {tuple(bias.shape)}", f"[{V}]")
    for name, tensor in (("weight_VD", weight), ("targets_S", targets), ("token_weight_S", token_weight)):
        need(tensor.device == hidden.device, name, f"on {tensor.device}", f"on {hidden.device} like hidden_SD")
    need(math.isfinite(temperature) and temperature > 0, "temperature", temperature, "a positive number")
    need(softcap is None or (math.isfinite(softcap) and softcap > 0), "softcap", softcap, "None or positive")
    need(chunk_rows is None or chunk_rows >= 1, "chunk_rows", chunk_rows, "None or at least 1")
    if S and targets.device.type == "cpu":
        low, high = int(targets.min()), int(targets.max())
        need(0 <= low and high < V, "targets_S", f"in [{low}, {high}]", f"in [0, {V})")
