"""A loss summed over tokens, with its gradient, in one pass over the logits, which never exist all at once.

Shapes: S supervised rows, D width, V vocabulary, r rows of one chunk.

The gradient of a chunk is finished while its logits are there, so they are computed once: 6 S V D floating-point
operations for forward and backward together, where recomputing takes 8. This works because the loss is a weighted sum
over rows: the derivative by each row's log-probability and entropy is known as soon as these are. `epilogues` has the
formulas.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lit_reason.errors import UserError
from lit_reason.kernels import reference
from lit_reason.kernels.checks import Checks
from lit_reason.kernels.chunks import HeadChunks, Settings, settings_of, whole
from lit_reason.kernels.dispatch import row_passes
from lit_reason.kernels.epilogues import Epilogue, Tokens, derivatives, nll, terms_of

OP = "linear_token_loss"


class HeadOut(NamedTuple):
    """Loss and statistics of the supervised rows; only `loss_sum` carries a gradient.

    Args:
        loss_sum: scalar, sum over rows of `token_weight * loss`.
        logp_S: natural log-probability of each target under the (softcapped, tempered) distribution.
        entropy_S: entropy of that distribution in nats.
        hit_S: whether the target is the first of the largest logits.
        metrics: what the loss reports of each row, [S] by name; `ref_logp` where a reference was given.
    """

    loss_sum: Tensor
    logp_S: Tensor
    entropy_S: Tensor
    hit_S: Tensor
    metrics: Mapping[str, Tensor] = {}


@torch.compiler.disable
def linear_token_loss(
    hidden_SD: Tensor,
    weight_VD: Tensor,
    targets_S: Tensor,
    token_weight_S: Tensor,
    *,
    loss: Epilogue = nll,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    index_S: Tensor | None = None,
    hidden_ref_SD: Tensor | None = None,
    chunk_rows: int | None = None,
    logits_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> HeadOut:
    """Sum of weighted token losses under `softmax(cap(hidden weight^T + bias) / temperature)`.

    `cap(z) = softcap * tanh(z / softcap)`. The caller folds every divisor (tokens of the batch, for instance)
    into `token_weight_S`; that keeps gradient accumulation and data parallelism exact. Gradients reach
    `hidden_SD`, `weight_VD`, `bias`, `token_weight_S` and whatever the loss was made from, each only if it asks for
    one. A second backward through the same result is refused because the buffers are handed over in the first, and so
    is `create_graph`: `token_logprobs` can do both. `torch.compile` leaves this operation to eager mode.

    Args:
        hidden_SD: rows to predict from, [S, D], any floating dtype; S may be 0.
        weight_VD: head weight, [V, D]. Its dtype is the dtype of the products, or autocast's where that is
            on. A DTensor is gathered, and its gradient summed over processes.
        targets_S: token to predict per row, [S], integers in [0, V).
        token_weight_S: weight per row, [S], finite; zero and negative weights are allowed. A row of weight 0 adds
            nothing, even where its loss is not finite.
        loss: loss of a token from its log-probability and entropy; see `epilogues`.
        bias: head bias, [V].
        temperature: positive divisor of the logits.
        softcap: positive bound of the logits before the temperature, or None.
        index_S: rows of `hidden_SD` to take, each at most once; all that has one entry per row is then as long as it.
        hidden_ref_SD: rows of a reference policy that shares this head, [S, D]: its log-probabilities, without
            gradient, are computed from the same weights chunk by chunk; the loss finds them in `Tokens.ref_logp_r`.
        chunk_rows: rows per chunk; None takes 512 on a CPU and about 1 GiB of logits on a GPU.
        logits_dtype: torch.float32 keeps the logits of 16-bit products unrounded.
        backend: `auto`, `torch`, `triton` or `reference`; see `dispatch`.

    Returns:
        Loss and per-row statistics, float32 (float64 for a float64 weight).

    Raises:
        UserError: an argument has a wrong shape, dtype or value; the message names it.
    """
    check = Checks(OP)
    check.head(hidden_SD, weight_VD, bias)
    check.settings(temperature, chunk_rows, logits_dtype, softcap=softcap)
    if hidden_ref_SD is not None:
        given, like = tuple(hidden_ref_SD.shape), tuple(hidden_SD.shape)
        check.need(given == like, "hidden_ref_SD", f"of shape {given}", f"of shape {like} like hidden_SD")
        check.same_device(hidden_SD, hidden_ref_SD=hidden_ref_SD)
    if index_S is not None:
        check.rows(index_S, hidden_SD)
        hidden_SD = hidden_SD.index_select(0, index_S)
        hidden_ref_SD = None if hidden_ref_SD is None else hidden_ref_SD.index_select(0, index_S)
    check.targets(hidden_SD, targets_S)
    check.target_values(targets_S, weight_VD.shape[0])
    check.weights(hidden_SD, token_weight_S)
    weight_VD = whole(weight_VD)
    S, device = hidden_SD.shape[0], hidden_SD.device
    settings = settings_of(OP, S, weight_VD, temperature, softcap, chunk_rows, logits_dtype, backend)
    targets, weights = targets_S.long(), token_weight_S.to(settings.stats)
    head = (hidden_SD, weight_VD, bias)
    with torch.autocast(device.type, enabled=False):
        if settings.backend == "reference":
            tokens, hit, grads = *_reference(*head, targets, hidden_ref_SD, settings), None
        else:
            tokens, hit, grads = _one_pass(*head, targets, weights, loss, hidden_ref_SD, settings)
        # The formula once more, over all rows: its value, what it reports, and gradients of what it was made from.
        terms = terms_of(loss, tokens)
        loss_sum = weighted_sum(weights, terms.loss_r)
        if grads is not None:
            loss_sum = Attach.apply(loss_sum, *head, grads)
    metrics = {name: vector.detach() for name, vector in terms.metrics.items()}
    if tokens.ref_logp_r is not None:
        metrics["ref_logp"] = tokens.ref_logp_r
    return HeadOut(loss_sum, tokens.logp_r.detach(), tokens.entropy_r.detach(), hit, metrics)


def weighted_sum(weights: Tensor, losses: Tensor) -> Tensor:
    """Sum of weighted losses; one of weight 0 adds nothing, even where it is not finite.

    Args:
        weights: weight of each row, [S].
        losses: loss of each row, [S].
    """
    return (weights * losses.masked_fill((weights == 0) & ~torch.isfinite(losses), 0.0)).sum()


def wanted_of(*tensors: Tensor | None) -> tuple[bool, ...]:
    """Which tensors a gradient must be computed for.

    Args:
        *tensors: tensors, or None.
    """
    return tuple(torch.is_grad_enabled() and t is not None and t.requires_grad for t in tensors)


def _reference(hidden, weight, bias, targets, hidden_ref, settings: Settings) -> tuple[Tokens, Tensor]:
    logp, entropy, _, hit = reference.token_stats(reference.logits(hidden, weight, bias, settings), targets)
    ref_logp = None
    if hidden_ref is not None:
        with torch.no_grad():
            ref_logp = reference.token_stats(reference.logits(hidden_ref, weight, bias, settings), targets)[0]
    return Tokens(logp, entropy, slice(0, hidden.shape[0]), ref_logp), hit


def _one_pass(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    token_weight: Tensor,
    loss: Epilogue,
    hidden_ref: Tensor | None,
    settings: Settings,
) -> tuple[Tokens, Tensor, list[Tensor | None] | None]:
    """Statistics of all rows, and the gradients of hidden, weight and bias if one of them asks for its."""
    wanted, S = wanted_of(hidden, weight, bias), hidden.shape[0]
    logp, entropy, ref_logp = (hidden.new_empty(S, dtype=settings.stats) for _ in range(3))
    hit = hidden.new_empty(S, dtype=torch.bool)
    tokens = Tokens(logp, entropy, slice(0, S), None if hidden_ref is None else ref_logp)
    with torch.no_grad():
        chunks = HeadChunks(hidden, weight, bias, settings, wanted)
        passes, transform = row_passes(settings.backend), chunks.transform
        for part in chunks.parts:
            if hidden_ref is not None:
                ref_logp[part] = passes.row_stats(chunks.logits(part, hidden_ref), targets[part], transform).logp_r
            z = chunks.logits(part)
            stats = passes.row_stats(z, targets[part], transform)
            logp[part], entropy[part], hit[part] = stats.logp_r, stats.entropy_r, stats.hit_r
            if chunks.wanted:
                g_logp, g_entropy = derivatives(loss, tokens.of(part), token_weight[part])
                passes.row_grad_(z, targets[part], stats, g_logp, g_entropy, transform)
                chunks.add_gradients(part, z)
    return tokens, hit, list(chunks.gradients()) if chunks.wanted else None


class Attach(torch.autograd.Function):
    """Gives a loss the gradients that were computed with it, to be handed over in the backward pass."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, grads: list) -> Tensor:
        ctx.grads = grads
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if torch.is_grad_enabled():
            raise UserError(
                f"{OP}: create_graph=True needs a backward pass that can be differentiated; compute the loss from "
                "token_logprobs, whose backward pass can"
            )
        if ctx.grads is None:
            raise RuntimeError(f"{OP}: backward ran twice; its gradients are handed over in the first")
        grads, ctx.grads = ctx.grads, None
        # Reading the upstream factor costs nothing on a CPU; on a GPU it would wait for the device.
        if upstream.device.type != "cpu" or upstream.item() != 1.0:
            for grad in grads:
                if grad is not None:
                    grad.mul_(upstream)
        return upstream, *grads, None
