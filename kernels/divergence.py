"""Divergence between the distributions of two heads, summed over rows, with the student's gradient, in one pass.

Shapes: S rows, D_s and D_t widths of student and teacher, V their common vocabulary.

For distillation, and for keeping a model near a reference: the teacher's logits are computed from its hidden states,
chunk by chunk beside the student's, so neither [S, V] exists; keeping D_t numbers a token is far less than keeping V.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lit_reason.errors import did_you_mean
from lit_reason.kernels import reference
from lit_reason.kernels.checks import Checks
from lit_reason.kernels.chunks import HeadChunks, settings_of, whole
from lit_reason.kernels.dispatch import row_passes
from lit_reason.kernels.head_loss import Attach, wanted_of, weighted_sum

OP = "linear_divergence"
KINDS = ("fkl", "rkl", "jsd")


class DivergenceOut(NamedTuple):
    """Only `loss_sum` carries a gradient.

    Args:
        loss_sum: scalar, sum over rows of `token_weight * divergence`.
        divergence_S: divergence in each row, in nats.
    """

    loss_sum: Tensor
    divergence_S: Tensor


@torch.compiler.disable
def linear_divergence(
    hidden_s_SD: Tensor,
    weight_s_VD: Tensor,
    hidden_t_SD: Tensor,
    weight_t_VD: Tensor,
    token_weight_S: Tensor,
    *,
    kind: str,
    beta: float = 0.5,
    temperature: float = 1.0,
    bias_s: Tensor | None = None,
    bias_t: Tensor | None = None,
    softcap_s: float | None = None,
    softcap_t: float | None = None,
    index_S: Tensor | None = None,
    chunk_rows: int | None = None,
    logits_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> DivergenceOut:
    """Sum of weighted divergences between `softmax(cap(hidden weight^T + bias) / temperature)` of student and teacher.

    `fkl` is KL(teacher, student), `rkl` is KL(student, teacher), `jsd` is the generalised Jensen-Shannon divergence
    beta KL(teacher, M) + (1 - beta) KL(student, M) with M = beta teacher + (1 - beta) student (GKD, arXiv 2306.13649).
    Gradients reach the student's tensors and `token_weight_S`, never the teacher's. As in `linear_token_loss`, divisors
    belong into `token_weight_S` (that includes a factor temperature^2, where one is wanted); the gradients are handed
    over in the first backward pass.

    Args:
        hidden_s_SD: the student's rows, [S, D_s].
        weight_s_VD: the student's head, [V, D_s]; a DTensor is gathered and its gradient summed over processes.
        hidden_t_SD: the teacher's rows, [S, D_t].
        weight_t_VD: the teacher's head, [V, D_t].
        token_weight_S: weight per row, [S], finite; a row of weight 0 adds nothing.
        kind: `fkl`, `rkl` or `jsd`.
        beta: the teacher's share in the mixture of `jsd`, between 0 and 1.
        temperature: positive divisor of both logits.
        bias_s: the student's head bias, [V]. A -inf in both biases takes a token out of both distributions.
        bias_t: the teacher's head bias, [V].
        softcap_s: bound of the student's logits before the temperature, or None.
        softcap_t: bound of the teacher's.
        index_S: rows to take, of both; `token_weight_S` then has one entry for each.
        chunk_rows: rows per chunk; None takes 512 on a CPU and about 1 GiB of logits on a GPU.
        logits_dtype: torch.float32 keeps the logits of 16-bit products unrounded.
        backend: `auto`, `torch`, `triton` or `reference`; see `dispatch`.

    Returns:
        Loss and the divergence of each row, float32 (float64 for a float64 student).

    Raises:
        UserError: an argument has a wrong shape, dtype or value; the message names it.
    """
    check = Checks(OP)
    check.head(hidden_s_SD, weight_s_VD, bias_s, "_s")
    check.head(hidden_t_SD, weight_t_VD, bias_t, "_t")
    check.same_device(hidden_s_SD, hidden_t_SD=hidden_t_SD)
    (S, _), V = hidden_s_SD.shape, weight_s_VD.shape[0]
    rows_t, V_t = hidden_t_SD.shape[0], weight_t_VD.shape[0]
    check.need(rows_t == S, "hidden_t_SD", f"{rows_t} rows", f"{S} rows like hidden_s_SD")
    check.need(V_t == V, "weight_t_VD", f"a head of {V_t} tokens", f"one of {V}, like weight_s_VD")
    check.need(kind in KINDS, "kind", f"'{kind}'", ", ".join(KINDS) + did_you_mean(kind, KINDS))
    check.need(kind != "jsd" or 0 < beta < 1, "beta", beta, "between 0 and 1, both left out")
    check.settings(temperature, chunk_rows, logits_dtype, softcap_s=softcap_s, softcap_t=softcap_t)
    if index_S is not None:
        check.rows(index_S, hidden_s_SD)
        hidden_s_SD, hidden_t_SD = (h.index_select(0, index_S) for h in (hidden_s_SD, hidden_t_SD))
        S = index_S.shape[0]
    check.weights(hidden_s_SD, token_weight_S)
    student = (hidden_s_SD, whole(weight_s_VD), bias_s)
    teacher = (hidden_t_SD, whole(weight_t_VD), bias_t)
    how = (chunk_rows, logits_dtype, backend, 2)
    settings_s = settings_of(OP, S, student[1], temperature, softcap_s, *how)
    settings_t = settings_of(OP, S, teacher[1], temperature, softcap_t, *how)._replace(rows=settings_s.rows)
    weights, grads = token_weight_S.to(settings_s.stats), None
    with torch.autocast(hidden_s_SD.device.type, enabled=False):
        if settings_s.backend == "reference":
            with torch.no_grad():
                z_t = reference.logits(*teacher, settings_t)
            values = reference.divergence(reference.logits(*student, settings_s), z_t, kind, beta)
        else:
            wanted = wanted_of(*student)
            with torch.no_grad():
                chunks = HeadChunks(*student, settings_s, wanted)
                values = _one_pass(chunks, HeadChunks(*teacher, settings_t), weights, kind, beta)
            grads = list(chunks.gradients()) if chunks.wanted else None
        loss_sum = weighted_sum(weights, values)
        if grads is not None:
            loss_sum = Attach.apply(loss_sum, *student, grads)
    return DivergenceOut(loss_sum, values.detach())


def _one_pass(chunks: HeadChunks, others: HeadChunks, token_weight: Tensor, kind: str, beta: float) -> Tensor:
    """Divergence of every row; the student's gradients are added up in `chunks`, where they are wanted."""
    passes, transforms = row_passes(chunks.settings.backend), (chunks.transform, others.transform)
    values = torch.empty_like(token_weight)
    for part in chunks.parts:
        z_s, z_t = chunks.logits(part), others.logits(part)
        stats = passes.divergence_stats(z_s, z_t, kind, beta, *transforms)
        values[part] = stats.value_r
        if chunks.wanted:
            passes.divergence_grad_(z_s, z_t, stats, token_weight[part], kind, beta, *transforms)
            if kind == "rkl":  # infinite where the teacher has no chance; times a weight of 0 that is NaN
                z_s.masked_fill_((token_weight[part] == 0)[:, None], 0.0)
            chunks.add_gradients(part, z_s)
    return values
