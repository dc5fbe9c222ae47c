"""Row passes as Triton kernels: the functions of `row_passes` on a GPU.

Shapes: r rows of one chunk, V vocabulary.

Same names, arguments and meaning as in `row_passes`, for float32, float16 and bfloat16; all arithmetic and statistics
are float32. Rows may have any stride; where it is a multiple of 16 bytes, logits move 128 bits at a time. Nothing here
waits for the device or tunes itself: the block is the same in every run.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from lit_reason.kernels.row_passes import DivergenceStats, RowStats, Transform
from lit_reason.kernels.triton_kernels import divergence_grad_kernel, divergence_kernel, grad_kernel, stats_kernel

LANE_BYTES = 16  # the widest load of one thread
# Lanes in one block of a row: 4096 logits of 2 bytes, or 2048 of 4. Two rows at a time need twice the registers.
LANES = 512
LANES_OF_A_PAIR = 256
# Said here, because Triton's own default changes from release to release.
OPTIONS = {"num_warps": 8, "enable_fp_fusion": True}


def row_stats(logits_rV: Tensor, targets_r: Tensor, transform: Transform) -> RowStats:
    """`row_passes.row_stats`.

    Args:
        logits_rV: products of the head, [r, V], float32, float16 or bfloat16, of any row stride.
        targets_r: column of each row's token, or -1.
        transform: from products to z.

    Returns:
        Statistics of each row, float32.
    """
    logp, entropy, largest, log_sum = _vectors(logits_rV, 4)
    hit = torch.empty_like(logp, dtype=torch.bool)
    bias, softcap, scale = _arguments(transform)
    _launch(
        stats_kernel,
        logits_rV,
        LANES,
        (logits_rV, targets_r.contiguous(), bias, logp, entropy, largest, log_sum, hit),
        (logits_rV.stride(0), logits_rV.shape[1], softcap, scale),
    )
    return RowStats(logp, entropy, largest, log_sum, hit)


def row_grad_(
    logits_rV: Tensor,
    targets_r: Tensor,
    stats: RowStats,
    g_logp_r: Tensor,
    g_entropy_r: Tensor | None,
    transform: Transform,
) -> None:
    """`row_passes.row_grad_`.

    Args:
        logits_rV: products of the head; afterwards the gradient with respect to them.
        targets_r: column of each row's token, or -1.
        stats: of the same rows.
        g_logp_r: derivative of the loss by each log-probability, [r].
        g_entropy_r: derivative of the loss by each entropy, [r], or None for zero.
        transform: from products to z.
    """
    bias, softcap, scale = _arguments(transform)
    g_entropy = None if g_entropy_r is None else _dense(g_entropy_r)
    vectors = (_dense(v) for v in (stats.entropy_r, stats.largest_r, stats.log_sum_r, g_logp_r))
    _launch(
        grad_kernel,
        logits_rV,
        LANES,
        (logits_rV, targets_r.contiguous(), bias, *vectors, g_entropy),
        (logits_rV.stride(0), logits_rV.shape[1], softcap, scale),
    )


def divergence_stats(
    logits_s_rV: Tensor,
    logits_t_rV: Tensor,
    kind: str,
    beta: float,
    transform_s: Transform,
    transform_t: Transform,
) -> DivergenceStats:
    """`row_passes.divergence_stats`.

    Args:
        logits_s_rV: products of the student's head, [r, V].
        logits_t_rV: products of the teacher's head, [r, V].
        kind: `fkl`, `rkl` or `jsd`.
        beta: share of the teacher in the mixture of `jsd`.
        transform_s: from products to z, student.
        transform_t: from products to z, teacher.

    Returns:
        Value and what the gradient needs, for each row.
    """
    value, inner, lse_s, lse_t = _vectors(logits_s_rV, 4)
    pair, numbers = _pair(logits_s_rV, logits_t_rV, kind, beta, transform_s, transform_t)
    _launch(divergence_kernel, logits_s_rV, LANES_OF_A_PAIR, (*pair, value, inner, lse_s, lse_t), numbers, KIND=kind)
    return DivergenceStats(value, inner, lse_s, lse_t)


def divergence_grad_(
    logits_s_rV: Tensor,
    logits_t_rV: Tensor,
    stats: DivergenceStats,
    g_r: Tensor,
    kind: str,
    beta: float,
    transform_s: Transform,
    transform_t: Transform,
) -> None:
    """`row_passes.divergence_grad_`.

    Args:
        logits_s_rV: products of the student's head; afterwards the gradient with respect to them.
        logits_t_rV: products of the teacher's head; left as they are.
        stats: of the same rows.
        g_r: derivative of the loss by each divergence, [r].
        kind: `fkl`, `rkl` or `jsd`.
        beta: as in `divergence_stats`.
        transform_s: from products to z, student.
        transform_t: from products to z, teacher.
    """
    pair, numbers = _pair(logits_s_rV, logits_t_rV, kind, beta, transform_s, transform_t)
    vectors = (_dense(v) for v in (stats.inner_r, stats.lse_s_r, stats.lse_t_r, g_r))
    _launch(divergence_grad_kernel, logits_s_rV, LANES_OF_A_PAIR, (*pair, *vectors), numbers, KIND=kind)


def _vectors(logits: Tensor, count: int) -> list[Tensor]:
    return [logits.new_empty(logits.shape[0], dtype=torch.float32) for _ in range(count)]


def _dense(vector: Tensor) -> Tensor:
    return vector.to(torch.float32).contiguous()


def _arguments(transform: Transform) -> tuple[Tensor | None, float | None, float]:
    bias = None if transform.bias_V is None else transform.bias_V.contiguous()
    return bias, transform.softcap, float(transform.inverse_temperature)


def _pair(
    s: Tensor, t: Tensor, kind: str, beta: float, transform_s: Transform, transform_t: Transform
) -> tuple[tuple, tuple]:
    """The pointers with which a divergence kernel's arguments begin, and the numbers with which they end."""
    bias_s, softcap_s, scale_s = _arguments(transform_s)
    bias_t, softcap_t, scale_t = _arguments(transform_t)
    mix = (beta, math.log(beta), math.log1p(-beta)) if kind == "jsd" else (0.5, 0.0, 0.0)  # read by jsd alone
    sizes = (s.stride(0), t.stride(0), s.shape[1])
    return (s, t, bias_s, bias_t), (*sizes, softcap_s, softcap_t, scale_s, scale_t, *mix)


def _launch(kernel: Any, logits: Tensor, lanes: int, pointers: tuple, numbers: tuple, **constants: str) -> None:
    """One program for each row of `logits`, on its device."""
    if logits.shape[0] == 0:
        return
    on_device: AbstractContextManager = torch.cuda.device(logits.device) if logits.is_cuda else nullcontext()
    with on_device:
        per = LANE_BYTES // logits.element_size()
        kernel[(logits.shape[0],)](*pointers, *numbers, LANES=lanes, PER=per, **constants, **OPTIONS)
