"""Log-probabilities, entropies and hits of chosen tokens under a language-model head, with a recomputing backward.

Shapes: S rows, D width, V vocabulary.

The general member of the family: forward keeps the rows and five numbers each; backward computes each chunk's logits
again (8 S V D floating-point operations together). Use it where the loss is not a sum over tokens with derivatives
known row by row: sequence-level ratios, losses over groups, several losses over the same log-probabilities. Where it
is, `linear_token_loss` needs 6 S V D.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lit_reason.kernels import reference
from lit_reason.kernels.checks import Checks
from lit_reason.kernels.chunks import HeadChunks, Settings, parts_of, settings_of, whole
from lit_reason.kernels.dispatch import row_passes
from lit_reason.kernels.row_passes import RowStats

OP = "token_logprobs"


class TokenStats(NamedTuple):
    """Statistics of each row; `logp_S` and `entropy_S` carry gradients.

    Args:
        logp_S: natural log-probability of each target under the (capped, tempered) distribution.
        entropy_S: entropy of that distribution in nats.
        lse_S: log of its partition sum.
        hit_S: whether the target is the first of the largest logits.
    """

    logp_S: Tensor
    entropy_S: Tensor
    lse_S: Tensor
    hit_S: Tensor


def token_logprobs(
    hidden_SD: Tensor,
    weight_VD: Tensor,
    targets_S: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    index_S: Tensor | None = None,
    chunk_rows: int | None = None,
    logits_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> TokenStats:
    """Statistics of tokens under `softmax(cap(hidden weight^T + bias) / temperature)`, never holding [S, V].

    `cap(z) = softcap * tanh(z / softcap)`. Gradients of `logp_S` and `entropy_S` reach `hidden_SD`, `weight_VD` and
    `bias`, each only if it asks for one. With `create_graph=True` the backward pass runs in plain differentiable torch,
    one checkpointed chunk at a time: slower, and exact to any order. `torch.compile` sees one opaque operation.

    Args:
        hidden_SD: rows to predict from, any floating dtype; S may be 0.
        weight_VD: head weight. Its dtype is the dtype of the products, or autocast's where that is on. A DTensor is
            gathered, and its gradient summed over processes.
        targets_S: token to predict per row, integers in [0, V).
        bias: head bias, [V].
        temperature: positive divisor of the logits.
        softcap: positive bound of the logits before the temperature, or None.
        index_S: rows of `hidden_SD` to take, each at most once; `targets_S` then has one entry for each. None takes
            all.
        chunk_rows: rows per chunk; None takes 512 on a CPU and about 1 GiB of logits on a GPU.
        logits_dtype: torch.float32 keeps the logits of 16-bit products unrounded, for ratios against an engine that
            does.
        backend: `auto`, `torch`, `triton` or `reference`; see `dispatch`.

    Returns:
        Statistics, float32 (float64 for a float64 weight).

    Raises:
        UserError: an argument has a wrong shape, dtype or value; the message names it.
    """
    check = Checks(OP)
    check.head(hidden_SD, weight_VD, bias)
    check.settings(temperature, chunk_rows, logits_dtype, softcap=softcap)
    if index_S is not None:
        check.rows(index_S, hidden_SD)
        hidden_SD = hidden_SD.index_select(0, index_S)
    check.targets(hidden_SD, targets_S)
    weight_VD = whole(weight_VD)
    S, V = hidden_SD.shape[0], weight_VD.shape[0]
    settings = settings_of(OP, S, weight_VD, temperature, softcap, chunk_rows, logits_dtype, backend)
    if settings.backend == "reference":
        check.target_values(targets_S, V)
        with torch.autocast(hidden_SD.device.type, enabled=False):
            z = reference.logits(hidden_SD, weight_VD, bias, settings)
            logp, entropy, lse, hit = reference.token_stats(z, targets_S)
        return TokenStats(logp, entropy, lse.detach(), hit)
    stats = RowStats(*_forward(hidden_SD, weight_VD, bias, targets_S, *settings))
    return TokenStats(stats.logp_r, stats.entropy_r, (stats.largest_r + stats.log_sum_r).detach(), stats.hit_r)


def chunked_stats(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, settings: Settings
) -> tuple[Tensor, ...]:
    """The row statistics of all rows, in the order of `RowStats`, chunk by chunk.

    Args:
        hidden: rows, [S, D].
        weight: head weight, [V, D].
        bias: head bias, [V], or None.
        targets: column of each row's token, [S]; -1 where it is in none of these columns.
        settings: how the head is computed.
    """
    with torch.autocast(hidden.device.type, enabled=False):
        chunks = HeadChunks(hidden, weight, bias, settings)
        passes, transform = row_passes(settings.backend), chunks.transform
        found = [passes.row_stats(chunks.logits(part), targets[part].long(), transform) for part in chunks.parts]
    return tuple(map(torch.cat, zip(*found, strict=True))) if found else _empty(hidden, settings)


def chunked_gradients(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    stats: Sequence[Tensor],
    g_logp: Tensor,
    g_entropy: Tensor | None,
    settings: Settings,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of hidden, weight and bias from those of log-probability and entropy, chunk by chunk.

    Args:
        hidden: rows, [S, D].
        weight: head weight, [V, D].
        bias: head bias, [V], or None.
        targets: as in `chunked_stats`.
        stats: what `chunked_stats` returned; over all shards, where the vocabulary is in shards.
        g_logp: derivative of the loss by each log-probability, [S].
        g_entropy: derivative of the loss by each entropy, [S], or None.
        settings: how the head is computed.
        wanted: which of the three gradients to compute.
    """
    with torch.autocast(hidden.device.type, enabled=False):
        chunks = HeadChunks(hidden, weight, bias, settings, wanted)
        passes, transform = row_passes(settings.backend), chunks.transform
        for part in chunks.parts:
            z, of_part = chunks.logits(part), RowStats(*(vector[part] for vector in stats))
            g_part = None if g_entropy is None else g_entropy[part]
            passes.row_grad_(z, targets[part].long(), of_part, g_logp[part], g_part, transform)
            chunks.add_gradients(part, z)
        return chunks.gradients()


@torch.library.custom_op("lit_reason::token_logprobs", mutates_args=())
def _forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    softcap: float | None,
    inverse_temperature: float,
    compute: torch.dtype,
    logits: torch.dtype,
    rows: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    Checks(OP).target_values(targets, weight.shape[0])
    settings = Settings(softcap, inverse_temperature, compute, logits, rows, backend)
    return chunked_stats(hidden, weight, bias, targets, settings)  # type: ignore[return-value]


@_forward.register_fake
def _(hidden, weight, bias, targets, *settings):
    return _empty(hidden, Settings(*settings))


def _empty(hidden: Tensor, settings: Settings) -> tuple[Tensor, ...]:
    vectors = [hidden.new_empty(hidden.shape[0], dtype=settings.stats) for _ in range(4)]
    return (*vectors, hidden.new_empty(hidden.shape[0], dtype=torch.bool))


@torch.library.custom_op("lit_reason::token_logprobs_backward", mutates_args=())
def _gradients(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    stats: list[Tensor],
    g_logp: Tensor,
    g_entropy: Tensor | None,
    softcap: float | None,
    inverse_temperature: float,
    compute: torch.dtype,
    logits: torch.dtype,
    rows: int,
    backend: str,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """An empty tensor in place of a gradient that is not wanted: an operation returns no None."""
    settings = Settings(softcap, inverse_temperature, compute, logits, rows, backend)
    grads = chunked_gradients(hidden, weight, bias, targets, stats, g_logp, g_entropy, settings, wanted)
    d_hidden, d_weight, d_bias = (hidden.new_empty(0) if grad is None else grad for grad in grads)
    return d_hidden, d_weight, d_bias


@_gradients.register_fake
def _(hidden, weight, bias, targets, stats, g_logp, g_entropy, *settings):
    given = zip((hidden, weight, bias), settings[-1], strict=True)
    contiguous = torch.contiguous_format
    return tuple(torch.empty_like(of, memory_format=contiguous) if on else hidden.new_empty(0) for of, on in given)


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    hidden, weight, bias, targets, *ctx.settings = inputs
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden, weight, bias, targets, *output)


def _backward(ctx: Any, g_logp: Tensor | None, g_entropy: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    hidden, weight, bias, targets, *stats = ctx.saved_tensors
    rest = (None,) * (1 + len(ctx.settings))
    if g_logp is None:
        if g_entropy is None:
            return (None, None, None, *rest)
        g_logp = torch.zeros_like(g_entropy)
    if torch.is_grad_enabled():
        return (*_differentiable_gradients(ctx, hidden, weight, bias, targets, g_logp, g_entropy), *rest)
    wanted = list(ctx.needs_input_grad[:3])
    grads = _gradients(hidden, weight, bias, targets, stats, g_logp, g_entropy, *ctx.settings, wanted)
    return (*(grad if on else None for grad, on in zip(grads, wanted, strict=True)), *rest)


def _differentiable_gradients(ctx, hidden, weight, bias, targets, g_logp, g_entropy) -> list[Tensor | None]:
    """The same gradients as functions that can be differentiated again."""
    settings = Settings(*ctx.settings)

    def part_of_loss(x, w, b, part):
        logp, entropy, _, _ = reference.token_stats(reference.logits(x, w, b, settings), targets[part])
        loss = (g_logp[part] * logp).sum()
        return loss if g_entropy is None else loss + (g_entropy[part] * entropy).sum()

    with torch.autocast(hidden.device.type, enabled=False):
        losses = [
            checkpoint(part_of_loss, hidden[part], weight, bias, part, use_reentrant=False)
            for part in parts_of(hidden.shape[0], settings.rows)
        ]
        inputs = [t if on else None for t, on in zip((hidden, weight, bias), ctx.needs_input_grad[:3], strict=True)]
        if not losses:
            return [None if t is None else torch.zeros_like(t) for t in inputs]
        found = iter(torch.autograd.grad(sum(losses), [t for t in inputs if t is not None], create_graph=True))
        return [None if t is None else next(found) for t in inputs]


_forward.register_autograd(_backward, setup_context=_setup)
