"""Row passes in torch: what is done to a chunk of logits between the matrix products, whole rows at a time.

Shapes: r rows of one chunk, V vocabulary.

Every operation of the head-loss family is matrix products around these four functions. `triton_rows` has the same four
with the same arguments and meaning; `dispatch` chooses. Logits come as the product left them, [r, V] with rows of any
stride, in any floating dtype; statistics are float32, or float64 for float64 logits. The distribution of a row is
`softmax(z)` with `z = inverse_temperature * cap(logits + bias)` and `cap(a) = softcap * tanh(a / softcap)`. A column
at -inf has probability 0 whatever the cap, and contributes 0 to every sum.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

SCRATCH_BYTES_ON_CPU = 8 * 2**20  # a block of rows that stays in the cache
SCRATCH_BYTES = 256 * 2**20
NO_CHANCE = -1e4  # exp of it is 0 in every dtype, and a product with it is finite


class Transform(NamedTuple):
    """How the products of a head become the logits of a distribution.

    Args:
        bias_V: added to the products, any floating dtype, or None.
        softcap: bound of `softcap * tanh(logits / softcap)`, or None.
        inverse_temperature: factor after the cap.
    """

    bias_V: Tensor | None = None
    softcap: float | None = None
    inverse_temperature: float = 1.0

    @property
    def is_identity(self) -> bool:
        """Whether the products are the logits already."""
        return self.bias_V is None and self.softcap is None and self.inverse_temperature == 1.0


class RowStats(NamedTuple):
    """What one pass over the logits of a row finds out; each of shape [r].

    Args:
        logp_r: log-probability of the target; of target -1, minus the log of the partition sum.
        entropy_r: entropy in nats.
        largest_r: largest z of the row.
        log_sum_r: log of the sum of `exp(z - largest)`. The log of the partition sum is `largest_r + log_sum_r`; kept
            apart, a row of very large or very negative logits loses no digits.
        hit_r: whether the target is the first of the largest logits, bool.
    """

    logp_r: Tensor
    entropy_r: Tensor
    largest_r: Tensor
    log_sum_r: Tensor
    hit_r: Tensor


class DivergenceStats(NamedTuple):
    """What the passes over a pair of rows find out; each of shape [r].

    Args:
        value_r: the divergence.
        inner_r: the expectation under the student that its gradient subtracts: the divergence itself for `rkl`,
            KL(student, mixture) for `jsd`, 0 for `fkl`.
        lse_s_r: log of the student's partition sum.
        lse_t_r: log of the teacher's partition sum.
    """

    value_r: Tensor
    inner_r: Tensor
    lse_s_r: Tensor
    lse_t_r: Tensor


def row_stats(logits_rV: Tensor, targets_r: Tensor, transform: Transform) -> RowStats:
    """Log-probability, entropy, partition sum and argmax hit of each row; the logits stay as they are.

    With m the largest z and s the sum of exp(z - m), the entropy is `log s - sum(exp(z - m) (z - m)) / s`: this form
    does not subtract two numbers of the size of the logits.

    Args:
        logits_rV: products of the head, [r, V].
        targets_r: column of each row's token, int64 [r]; -1 where it is in none of these columns.
        transform: from products to z.

    Returns:
        Statistics of each row.
    """
    logp, entropy, largest, log_sum = (_vector(logits_rV) for _ in range(4))
    hit = torch.empty_like(targets_r, dtype=torch.bool)
    for part, (z, e) in _blocks(logits_rV, buffers=2):
        # A masked column becomes a number whose exponential is exactly 0: no inf - inf and no 0 * inf below.
        torch.clamp(_transformed(logits_rV[part], transform, z), min=torch.finfo(z.dtype).min / 2, out=z)
        columns = targets_r[part]
        at_target = z.gather(1, columns.clamp(min=0)[:, None])[:, 0].masked_fill_(columns < 0, 0.0)
        top, first = z.max(dim=-1)
        total = torch.exp(z.sub_(top[:, None]), out=e).sum(-1)
        largest[part], hit[part], log_sum[part] = top, first == columns, total.log()
        logp[part] = (at_target - top) - log_sum[part]
        entropy[part] = (log_sum[part] - z.mul_(e).sum(-1) / total).clamp_(min=0.0)
    return RowStats(logp, entropy, largest, log_sum, hit)


def row_grad_(
    logits_rV: Tensor,
    targets_r: Tensor,
    stats: RowStats,
    g_logp_r: Tensor,
    g_entropy_r: Tensor | None,
    transform: Transform,
) -> None:
    """Overwrite logits with the gradient of `g_logp * logp + g_entropy * entropy` of each row.

    dz_j = g_logp (1[j = target] - p_j) - g_entropy p_j (log p_j + entropy), then the factors of temperature and cap.

    Args:
        logits_rV: products of the head, [r, V]; afterwards the gradient with respect to them, in their dtype.
        targets_r: column of each row's token, or -1, as in `row_stats`.
        stats: of the same rows; `entropy_r`, `largest_r` and `log_sum_r` are read (over all shards of the vocabulary,
            where it is in shards).
        g_logp_r: derivative of the loss by each log-probability, [r].
        g_entropy_r: derivative of the loss by each entropy, [r], or None for zero.
        transform: from products to z.
    """
    softcap, scale = transform.softcap, transform.inverse_temperature
    for part, (work, *others) in _blocks(logits_rV, buffers=2 + (softcap is not None)):
        logits = logits_rV[part]
        z = _transformed(logits, transform, work)
        slope = None if softcap is None else _cap_slope(z, softcap * scale, out=others[1])
        shifted = torch.sub(z, stats.largest_r[part][:, None], out=work)
        dz = logits if logits.dtype == work.dtype else others[0]
        g_logp, log_sum = g_logp_r[part] * scale, stats.log_sum_r[part]
        if g_entropy_r is None:
            torch.exp(shifted, out=dz).mul_((-g_logp * torch.exp(-log_sum))[:, None])
        else:
            log_p = shifted.sub_(log_sum[:, None]).clamp_(min=NO_CHANCE)
            torch.exp(log_p, out=dz)
            g_entropy = g_entropy_r[part] * scale
            dz.mul_(log_p.add_(stats.entropy_r[part][:, None]).mul_(-g_entropy[:, None]).sub_(g_logp[:, None]))
        columns = targets_r[part]
        dz.scatter_add_(1, columns.clamp(min=0)[:, None], g_logp.masked_fill(columns < 0, 0.0)[:, None])
        if slope is not None:
            dz.mul_(slope)
        if dz is not logits:
            logits.copy_(dz)


def divergence_stats(
    logits_s_rV: Tensor,
    logits_t_rV: Tensor,
    kind: str,
    beta: float,
    transform_s: Transform,
    transform_t: Transform,
) -> DivergenceStats:
    """Divergence between the student's and the teacher's distribution in each row; the logits stay as they are.

    `fkl` is KL(teacher, student), `rkl` is KL(student, teacher), and `jsd` is beta KL(teacher, M) + (1 - beta)
    KL(student, M) with the mixture M = beta teacher + (1 - beta) student.

    Args:
        logits_s_rV: products of the student's head, [r, V].
        logits_t_rV: products of the teacher's head, [r, V].
        kind: `fkl`, `rkl` or `jsd`.
        beta: share of the teacher in the mixture of `jsd`, in (0, 1); not read otherwise.
        transform_s: from products to z, student.
        transform_t: from products to z, teacher.

    Returns:
        Value and what the gradient needs, for each row. A value is infinite where KL is: where one distribution has a
        chance and the other, at -inf, has none.
    """
    value, inner, lse_s, lse_t = (_vector(logits_s_rV) for _ in range(4))
    for part, (s, t, work) in _blocks(logits_s_rV, buffers=3):
        for logits, transform, lse, out in ((logits_s_rV, transform_s, lse_s, s), (logits_t_rV, transform_t, lse_t, t)):
            z = _transformed(logits[part], transform, out)
            top = z.amax(-1)
            lse[part] = top + torch.sub(z, top[:, None], out=work).exp_().sum(-1).log()
            torch.sub(z, lse[part][:, None], out=out)
        if kind == "fkl":
            value[part], inner[part] = _kl(t, s, work), 0.0
        elif kind == "rkl":
            value[part] = inner[part] = _kl(s, t, work)
        else:
            mixture = _log_mixture(s, t, beta)
            inner[part] = _kl(s, mixture, work)
            value[part] = beta * _kl(t, mixture, work) + (1 - beta) * inner[part]
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
    """Overwrite the student's logits with the gradient of `g * divergence` of each row.

    With p the student, q the teacher and M the mixture, dz_j is `p - q` (fkl), `p (log p - log q - inner)` (rkl) or
    `(1 - beta) p (log p - log M - inner)` (jsd), times g, then the factors of temperature and cap.

    Args:
        logits_s_rV: products of the student's head; afterwards the gradient with respect to them, in their dtype.
        logits_t_rV: products of the teacher's head; left as they are.
        stats: of the same rows.
        g_r: derivative of the loss by each divergence, [r].
        kind: `fkl`, `rkl` or `jsd`.
        beta: as in `divergence_stats`.
        transform_s: from products to z, student.
        transform_t: from products to z, teacher.
    """
    softcap, scale = transform_s.softcap, transform_s.inverse_temperature
    for part, buffers in _blocks(logits_s_rV, buffers=3 + (softcap is not None)):
        s = _transformed(logits_s_rV[part], transform_s, buffers[0])
        slope = None if softcap is None else _cap_slope(s, softcap * scale, out=buffers[3])
        t = _transformed(logits_t_rV[part], transform_t, buffers[1])
        s = torch.sub(s, stats.lse_s_r[part][:, None], out=buffers[0])
        t = torch.sub(t, stats.lse_t_r[part][:, None], out=buffers[1])
        p = torch.exp(s, out=buffers[2])
        g = (g_r[part] * scale)[:, None]
        if kind == "fkl":
            dz = p.sub_(t.exp_()).mul_(g)
        else:
            other = t if kind == "rkl" else _log_mixture(s, t, beta)
            excess = s.sub_(other).sub_(stats.inner_r[part][:, None])
            dz = p.mul_(excess.masked_fill_(p == 0, 0.0)).mul_(g if kind == "rkl" else g * (1 - beta))
        logits_s_rV[part].copy_(dz if slope is None else dz.mul_(slope))


def _vector(logits: Tensor) -> Tensor:
    return logits.new_empty(logits.shape[0], dtype=_stats_dtype(logits))


def _stats_dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _blocks(logits: Tensor, buffers: int) -> Iterator[tuple[slice, list[Tensor]]]:
    """Ranges of rows, each with scratch of its shape: temporaries stay small, on a CPU small enough for the cache."""
    rows, V = logits.shape
    dtype = _stats_dtype(logits)
    budget = SCRATCH_BYTES_ON_CPU if logits.device.type == "cpu" else SCRATCH_BYTES
    block = max(1, min(rows, budget // (dtype.itemsize * V)))
    scratch = [logits.new_empty((block, V), dtype=dtype) for _ in range(buffers)]
    for start in range(0, rows, block):
        stop = min(start + block, rows)
        yield slice(start, stop), [buffer[: stop - start] for buffer in scratch]


def _transformed(logits: Tensor, transform: Transform, work: Tensor) -> Tensor:
    """The z of some rows: the logits themselves where they are that already, otherwise in `work`."""
    if logits.dtype == work.dtype and transform.is_identity:
        return logits
    z = work.copy_(logits)
    if transform.bias_V is not None:
        z.add_(transform.bias_V)
    if transform.softcap is not None:
        masked = z == -torch.inf
        z.div_(transform.softcap).tanh_().mul_(transform.softcap).masked_fill_(masked, -torch.inf)
    if transform.inverse_temperature != 1.0:
        z.mul_(transform.inverse_temperature)
    return z


def _cap_slope(z: Tensor, bound: float, out: Tensor) -> Tensor:
    """1 - tanh^2 from z = bound * tanh."""
    return torch.div(z, bound, out=out).square_().neg_().add_(1.0).clamp_(min=0.0)


def _log_mixture(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    return torch.logaddexp(log_p + math.log(1 - beta), log_q + math.log(beta))


def _kl(log_p: Tensor, log_q: Tensor, out: Tensor) -> Tensor:
    """KL(p, q) of each row; a column without chance under p contributes 0."""
    p = torch.exp(log_p, out=out)
    return torch.sub(log_p, log_q).masked_fill_(p == 0, 0.0).mul_(p).sum(-1).clamp_(min=0.0)
