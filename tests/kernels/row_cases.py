"""The table of row-pass cases, and what a backend's row passes must give on each, by autograd in float64.

A backend is a module with the functions of `row_passes`. The cases are small enough for Triton's interpreter and chosen
for its kernels, which walk along a row in blocks: rows of one column, of exactly some blocks, of one column more.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from lit_reason.kernels.row_passes import Transform

KINDS = [("fkl", 0.5), ("rkl", 0.5), ("jsd", 0.3)]
ROWS = 4
NEVER = -1e30  # stands for -inf where a gradient must exist
# Relative error of statistics and of gradients that leave in the logits' dtype. Triton's interpreter cuts off digits
# where a GPU rounds to bfloat16, so there a gradient may be off by one unit in the last place, 2^-7.
TOLERANCES = {
    torch.float64: (1e-12, 1e-12),
    torch.float32: (2e-6, 5e-6),
    torch.float16: (2e-6, 5e-4),
    torch.bfloat16: (2e-6, 8e-3),
}


class Case(NamedTuple):
    """One input of the row passes.

    Args:
        logits: as a product leaves them, [r, V], float64.
        targets: columns, or -1, [r].
        transform: from logits to z.
        teacher: other logits for the divergences, [r, V].
    """

    logits: Tensor
    targets: Tensor
    transform: Transform
    teacher: Tensor


def draw(*shape: int, seed: int, scale: float = 3.0) -> Tensor:
    """Normal numbers in float64."""
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def case(V: int, seed: int, *, scale: float = 3.0, shift: float = 0.0, bias: bool = False, **transform: float) -> Case:
    """Random logits; targets are the first column, the last, none, and one between."""
    targets = torch.tensor([0, V - 1, -1, V // 2])
    bias_V = draw(V, seed=seed + 2, scale=1.0) if bias else None
    logits, teacher = (draw(ROWS, V, seed=s, scale=scale) + shift for s in (seed, seed + 1))
    return Case(logits, targets, Transform(bias_V, **transform), teacher)


def _ties(seed: int) -> Case:
    """Two largest logits are equal: the target is the first; the second; the second beside the first, which Triton
    reads with it; the second beside the first, which Triton reads without it."""
    it = case(40, seed)
    logits = it.logits.clamp(max=5.0)
    for row, pair in enumerate([(9, 33), (9, 33), (9, 10), (31, 32)]):
        logits[row, list(pair)] = 6.0
    return it._replace(logits=logits, targets=torch.tensor([9, 33, 10, 32]))


def _masked_columns(seed: int) -> Case:
    """A bias of -inf takes columns out, among them the first, a whole block of 32 and the last."""
    it = case(70, seed, bias=True)
    bias = it.transform.bias_V.clone()
    bias[[0, 20, 69]] = bias[32:64] = -math.inf
    return it._replace(targets=torch.tensor([1, 68, -1, 10]), transform=it.transform._replace(bias_V=bias))


def _masked_under_a_cap(seed: int) -> Case:
    it = _masked_columns(seed)
    return it._replace(transform=it.transform._replace(softcap=2.0, inverse_temperature=1.5))


def _one_hot(seed: int) -> Case:
    """One logit is so far ahead that the others have no chance: the target, another, or (no target) the first."""
    it = case(40, seed)
    logits = it.logits.clone()
    logits[:, 20] = 500.0
    logits[2, 0] = 600.0
    return it._replace(logits=logits)


CASES: dict[str, Callable[[int], Case]] = {
    **{f"V={V}": lambda seed, V=V: case(V, seed) for V in (1, 7, 16, 17, 32, 33, 65, 127, 129)},
    "V=1000": lambda seed: case(1000, seed, bias=True),
    "bias": lambda seed: case(33, seed, bias=True),
    "cold": lambda seed: case(40, seed, inverse_temperature=1 / 0.3),
    "hot": lambda seed: case(40, seed, inverse_temperature=0.5),
    "softcap": lambda seed: case(40, seed, softcap=30.0),
    "saturated": lambda seed: case(40, seed, softcap=1.5, inverse_temperature=2.0, bias=True),
    "overflow": lambda seed: case(40, seed, scale=1e3),
    "far below": lambda seed: case(40, seed, shift=-1e4),
    "far above": lambda seed: case(40, seed, shift=1e4),
    "ties": _ties,
    "one hot": _one_hot,
    "masked columns": _masked_columns,
    "masked under a cap": _masked_under_a_cap,
}


def rounded(it: Case, dtype: torch.dtype) -> Case:
    """The case with logits in a dtype and the bias in float32 or wider."""
    bias = it.transform.bias_V
    wide = torch.promote_types(dtype, torch.float32)
    transform = it.transform._replace(bias_V=None if bias is None else bias.to(wide))
    return it._replace(logits=it.logits.to(dtype), teacher=it.teacher.to(dtype), transform=transform)


def z_of(logits: Tensor, transform: Transform) -> Tensor:
    """The definition of z, with -1e30 for a column that a -inf takes out."""
    z = logits if transform.bias_V is None else logits + transform.bias_V.double()
    masked = z == -math.inf
    z = torch.where(masked, 0.0, z)
    if transform.softcap is not None:
        z = transform.softcap * torch.tanh(z / transform.softcap)
    return torch.where(masked, NEVER, z * transform.inverse_temperature)


def check_statistics(backend: ModuleType, it: Case, with_entropy: bool) -> None:
    """`row_stats` and `row_grad_` against autograd through a float64 softmax.

    Args:
        backend: module with the row passes.
        it: a case, rounded to the dtype to test.
        with_entropy: whether the loss has an entropy term.
    """
    stats_error, grad_error = TOLERANCES[it.logits.dtype]
    leaf = it.logits.detach().double().clone().requires_grad_()
    z = z_of(leaf, it.transform)
    log_p = torch.log_softmax(z, -1)
    known = it.targets >= 0
    lse = torch.logsumexp(z, -1)
    logp = torch.where(known, log_p.gather(1, it.targets.clamp(min=0)[:, None])[:, 0], -lse)
    entropy = -(log_p.exp() * log_p).sum(-1)

    logits = it.logits.clone()
    stats = backend.row_stats(logits, it.targets, it.transform)
    assert torch.equal(logits, it.logits), "row_stats wrote to the logits"
    assert torch.equal(stats.hit_r, z.argmax(-1) == it.targets)
    size = 1 + z.detach()[z > NEVER].abs().max()  # a float32 z has so many digits, and no more
    assert_near(stats.logp_r, logp, stats_error * size)
    assert_near(stats.entropy_r, entropy, stats_error * size)
    assert_near(stats.largest_r, z.max(-1).values, stats_error * size)
    assert_near(stats.largest_r.double() + stats.log_sum_r, lse, stats_error * size)
    assert (stats.entropy_r >= 0).all() and (stats.logp_r[known] <= 0).all()

    g_logp = draw(ROWS, seed=11)
    g_entropy = draw(ROWS, seed=12) if with_entropy else None
    loss = g_logp @ logp + (g_entropy @ entropy if g_entropy is not None else 0.0)
    (want,) = torch.autograd.grad(loss, leaf)
    wide = stats.logp_r.dtype
    backend.row_grad_(
        logits, it.targets, stats, g_logp.to(wide), None if g_entropy is None else g_entropy.to(wide), it.transform
    )
    assert_close(logits, want, grad_error, stats_error * size * it.transform.inverse_temperature)


def check_divergence(backend: ModuleType, it: Case, kind: str, beta: float) -> None:
    """`divergence_stats` and `divergence_grad_` against autograd.

    Args:
        backend: module with the row passes.
        it: a case, rounded to the dtype to test.
        kind: of the divergence.
        beta: share of the teacher in the mixture.
    """
    stats_error, grad_error = TOLERANCES[it.logits.dtype]
    of_teacher = Transform(it.transform.bias_V, None, 0.7)
    leaf = it.logits.detach().double().clone().requires_grad_()
    z_s, z_t = z_of(leaf, it.transform), z_of(it.teacher.double(), of_teacher)
    log_p, log_q = torch.log_softmax(z_s, -1), torch.log_softmax(z_t, -1)
    kl = lambda a, b: torch.where(a <= NEVER / 2, 0.0, a.exp() * (a - b)).sum(-1)  # noqa: E731
    mixture = torch.logaddexp(log_q + math.log(beta), log_p + math.log1p(-beta))
    inner = {"fkl": torch.zeros(ROWS).double(), "rkl": kl(log_p, log_q), "jsd": kl(log_p, mixture)}[kind]
    value = {"fkl": kl(log_q, log_p), "rkl": inner, "jsd": beta * kl(log_q, mixture) + (1 - beta) * inner}[kind]

    student, teacher = it.logits.clone(), it.teacher.clone()
    stats = backend.divergence_stats(student, teacher, kind, beta, it.transform, of_teacher)
    assert torch.equal(student, it.logits), "divergence_stats wrote to the logits"
    size = 1 + torch.cat([z_s, z_t]).detach()[torch.cat([z_s, z_t]) > NEVER].abs().max()
    # A probability is off by the error of z, and it multiplies a difference of log-probabilities.
    spread = (log_p - log_q).detach()[(z_s > NEVER) & (z_t > NEVER)].abs().max()
    error = stats_error * size * (0.5 + spread / 10)
    assert_near(stats.value_r, value, error)
    assert_near(stats.inner_r, inner, error)
    assert_near(stats.lse_s_r, torch.logsumexp(z_s, -1), stats_error * size)
    assert_near(stats.lse_t_r, torch.logsumexp(z_t, -1), stats_error * size)

    g = draw(ROWS, seed=13)
    (want,) = torch.autograd.grad(g @ value, leaf)
    backend.divergence_grad_(student, teacher, stats, g.to(stats.value_r.dtype), kind, beta, it.transform, of_teacher)
    assert_close(student, want, grad_error, error * it.transform.inverse_temperature)
    assert torch.equal(teacher, it.teacher), "divergence_grad_ wrote to the teacher's logits"


def assert_near(ours: Tensor, want: Tensor, error: Tensor | float) -> None:
    """Every entry differs by at most `error`; NaN never passes."""
    gap = (ours.double() - want.detach()).abs()
    assert (gap <= error).all(), (gap.tolist(), float(error))


def assert_close(ours: Tensor, want: Tensor, relative: float, absolute: Tensor) -> None:
    """Every entry differs by at most the sum of two errors, one relative to its row's largest; NaN never passes."""
    gap, largest = (ours.double() - want).abs().amax(-1), want.abs().amax(-1)
    assert (gap <= relative * largest + absolute).all(), (gap.tolist(), largest.tolist(), relative, float(absolute))
