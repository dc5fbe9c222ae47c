"""`token_logprobs` where each process of a group holds some rows of the head (vocabulary parallel).

Shapes: S rows, D width, V_i vocabulary of process i.

No process ever sees another's logits: one [S] vector each for the largest logit, the partition sum, the entropy, the
target's logit and the hit goes over the wire in forward, and [S, D] in backward. Entropies combine by the chain rule:
with w_i the probability of shard i, H = sum_i w_i (H_i - log w_i).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from lit_reason.kernels.checks import Checks
from lit_reason.kernels.chunks import settings_of
from lit_reason.kernels.row_passes import RowStats
from lit_reason.kernels.token_logprobs import TokenStats, chunked_gradients, chunked_stats

OP = "sharded_token_logprobs"


def sharded_token_logprobs(
    hidden_SD: Tensor,
    weight_shard_VD: Tensor,
    targets_S: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    bias_shard: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    chunk_rows: int | None = None,
    logits_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> TokenStats:
    """Statistics of tokens as `token_logprobs` gives them, from a head cut along its vocabulary.

    Every process calls this with the same rows and targets. The loss made of the result is the same on each; the
    gradients of `hidden_SD` are summed over the group, those of the shard stay where it is.

    Args:
        hidden_SD: rows to predict from, the same on all processes; S may be 0.
        weight_shard_VD: this process's rows of the head; shards lie in rank order and may differ in size.
        targets_S: token to predict per row, integers in [0, sum of all V_i).
        group: processes that share the head; None means all.
        bias_shard: this process's part of the head bias.
        temperature: positive divisor of the logits.
        softcap: positive bound of the logits before the temperature, or None.
        chunk_rows: rows per chunk, as in `token_logprobs`.
        logits_dtype: torch.float32 keeps the logits of 16-bit products unrounded.
        backend: `auto`, `torch` or `triton`; see `dispatch`.

    Returns:
        Statistics under the whole vocabulary, the same on all processes.

    Raises:
        UserError: an argument has a wrong shape, dtype or value; the message names it.
    """
    check = Checks(OP)
    check.head(hidden_SD, weight_shard_VD, bias_shard)
    check.settings(temperature, chunk_rows, logits_dtype, softcap=softcap)
    check.targets(hidden_SD, targets_S)
    S, V, device = hidden_SD.shape[0], weight_shard_VD.shape[0], hidden_SD.device
    sizes = torch.zeros(dist.get_world_size(group), dtype=torch.int64, device=device)
    sizes[dist.get_rank(group)] = V
    dist.all_reduce(sizes, group=group)
    ends = sizes.cumsum(0)
    check.target_values(targets_S, ends[-1])
    column = targets_S.long() - (ends[dist.get_rank(group)] - V)
    columns_S = column.masked_fill((column < 0) | (column >= V), -1)
    settings = settings_of(OP, S, weight_shard_VD, temperature, softcap, chunk_rows, logits_dtype, backend)
    check.need(settings.backend != "reference", "backend", "'reference'", "'torch' or 'triton'")
    return TokenStats(*_Sharded.apply(hidden_SD, weight_shard_VD, bias_shard, columns_S, settings, group))


class _Sharded(torch.autograd.Function):
    """Local statistics, combined; local gradients under the combined distribution."""

    @staticmethod
    def forward(ctx: Any, hidden, weight, bias, columns, settings, group):
        stats = _combine(RowStats(*chunked_stats(hidden, weight, bias, columns, settings)), columns, group)
        ctx.save_for_backward(hidden, weight, bias, columns, *stats)
        ctx.settings, ctx.group = settings, group
        lse = stats.largest_r + stats.log_sum_r
        ctx.mark_non_differentiable(lse, stats.hit_r)
        return stats.logp_r, stats.entropy_r, lse, stats.hit_r

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_logp, g_entropy, *_):
        hidden, weight, bias, columns, *stats = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:3]
        d_hidden, d_weight, d_bias = chunked_gradients(
            hidden, weight, bias, columns, stats, g_logp, g_entropy, ctx.settings, wanted
        )
        if d_hidden is not None:
            dist.all_reduce(d_hidden, group=ctx.group)
        return d_hidden, d_weight, d_bias, None, None, None


def _combine(local: RowStats, columns: Tensor, group: dist.ProcessGroup | None) -> RowStats:
    """Statistics of each row over all shards, from those of this one."""
    here = columns >= 0
    largest = _reduced(local.largest_r, dist.ReduceOp.MAX, group)
    log_part = local.log_sum_r + (local.largest_r - largest)  # log of this shard's part of the partition sum
    log_sum = _reduced(log_part.exp(), dist.ReduceOp.SUM, group).log()
    share = (log_part - log_sum).exp()
    entropy = (share * (local.entropy_r - (log_part - log_sum))).masked_fill(share == 0, 0.0)
    at_target = (local.logp_r + log_part).masked_fill(~here, 0.0)  # its logit less the largest of all
    logp = _reduced(at_target, dist.ReduceOp.SUM, group) - log_sum
    rank = dist.get_rank(group)
    first = torch.where(local.largest_r == largest, rank, dist.get_world_size(group))
    first = _reduced(first, dist.ReduceOp.MIN, group)
    hit = _reduced((local.hit_r & here & (first == rank)).int(), dist.ReduceOp.MAX, group).bool()
    return RowStats(logp, _reduced(entropy, dist.ReduceOp.SUM, group).clamp_(min=0.0), largest, log_sum, hit)


def _reduced(vector: Tensor, how: Any, group: dist.ProcessGroup | None) -> Tensor:
    vector = vector.clone()
    dist.all_reduce(vector, how, group=group)
    return vector
