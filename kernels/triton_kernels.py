"""The Triton kernels behind `triton_rows`: one program a row, no matrix product.

Each program walks along its row in blocks of `[LANES, PER]` logits. A lane is 16 bytes, which a thread loads with one
instruction, and running maxima and sums are kept per lane: no thread waits for another before the end of the row. Only
the last block of a row, TAIL, looks at where the row ends. Row offsets are int64 and rows lie on the first axis of the
grid: neither the number of logits nor the number of rows is bounded by 2^31 or 65,535.

`source` is (logits, bias, softcap, scale): one row, and how its logits become z = scale cap(logits + bias). Without a
bias or a cap these are None, and the code for them is not compiled.
"""

from __future__ import annotations

import math

from lit_reason.errors import UserError

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise UserError("kernels in Triton need the package triton: pip install 'lit-reason[gpu]'") from error

LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-1.7014117331926443e38)  # half of float32's lowest, as in `row_passes`
FAR = tl.constexpr(-1e30)  # a distance whose exponential is 0 at every temperature
NO_CHANCE = tl.constexpr(-1e4)
MINUS_INF = tl.constexpr(-math.inf)


@triton.jit
def _load(pointer, columns, V, other, TAIL: tl.constexpr):
    if TAIL:
        x = tl.load(pointer + columns, mask=columns < V, other=other)
    else:
        x = tl.load(pointer + columns)
    return x.to(tl.float32)


@triton.jit
def _capped(source, columns, V, TAIL: tl.constexpr):
    """cap(logits + bias) of some columns, and the slope of the cap. Columns behind the end are at -inf.

    A column at -inf stays there, and has slope 0 under a cap.
    """
    logits, bias, softcap, _ = source
    a = _load(logits, columns, V, MINUS_INF, TAIL)
    if bias is not None:
        a += _load(bias, columns, V, 0.0, TAIL)
    slope = 1.0
    if softcap is not None:
        t = tl.exp2(tl.abs(a) * (-2.0 * LOG2E / softcap))  # tanh |x| = (1 - t) / (1 + t) with t = exp(-2 |x|)
        slope = 4.0 * t / ((1.0 + t) * (1.0 + t))
        bounded = softcap * ((1.0 - t) / (1.0 + t))
        bounded = tl.where(a < 0.0, -bounded, bounded)
        a = tl.where(a == MINUS_INF, a, bounded)
    return a, slope


@triton.jit
def _columns(start, LANES: tl.constexpr, PER: tl.constexpr):
    return start + tl.arange(0, LANES)[:, None] * PER + tl.arange(0, PER)[None, :]


@triton.jit
def _finite(a):
    """A masked column becomes a number whose exponential is 0: no inf - inf and no 0 * inf after it. NaN stays."""
    return tl.where(a < LOWEST, LOWEST, a)


@triton.jit
def _not_negative(x):
    return tl.where(x < 0.0, 0.0, x)  # NaN stays


@triton.jit
def _decay(old, new, scale):
    """How far a running maximum rose, kept finite, and the factor that makes older exponentials relative to it."""
    rise = tl.maximum(old - new, FAR)
    return rise, tl.exp2(rise * (scale * LOG2E))


@triton.jit
def _grow(top, source, columns, V, TAIL: tl.constexpr):
    """Largest of each lane in one block, new running maximum, `capped` relative to it, exponential of that in z."""
    a, _ = _capped(source, columns, V, TAIL)
    a = _finite(a)
    largest = tl.max(a, axis=1)
    top = tl.maximum(top, largest)
    below = a - top[:, None]
    e = tl.exp2(below * (source[3] * LOG2E))
    if TAIL:
        e = tl.where(columns < V, e, 0.0)
    return largest, top, below, e


# ---------------------------------------------------------------- statistics of rows and their gradient


@triton.jit
def _absorb(state, source, start, V, target, a_target, LANES: tl.constexpr, PER: tl.constexpr, TAIL: tl.constexpr):
    """Take one block into what each lane knows: maximum, sum of e, sum of e (a - maximum), is the target beaten.

    A lane that holds a larger logit beats the target, and an equal one if all of the lane is before it.
    """
    top, total, shifted, beaten = state
    largest, new_top, below, e = _grow(top, source, _columns(start, LANES, PER), V, TAIL)
    rise, keep = _decay(top, new_top, source[3])
    shifted = keep * (shifted + rise * total) + tl.sum(e * below, axis=1)
    total = keep * total + tl.sum(e, axis=1)
    before = start + (tl.arange(0, LANES) + 1) * PER <= target
    beats = (largest > a_target) | ((largest == a_target) & before)
    return new_top, total, shifted, beaten | beats.to(tl.int32)


@triton.jit
def stats_kernel(
    logits,
    targets,
    bias,
    logp_out,
    entropy_out,
    largest_out,
    log_sum_out,
    hit_out,
    row_stride,
    V,
    softcap,
    scale,
    LANES: tl.constexpr,
    PER: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    source = (logits + row * row_stride, bias, softcap, scale)
    target = tl.load(targets + row).to(tl.int32)
    column = tl.maximum(target, 0)
    a_target, _ = _capped(source, column, V, False)
    a_target = _finite(a_target)
    own = column // PER * PER + tl.arange(0, PER)  # the lane of the target: equal ones before it beat it, too
    a_own, _ = _capped(source, own, V, True)
    beaten_at_home = tl.max(((_finite(a_own) == a_target) & (own < column)).to(tl.int32), axis=0)

    zero = tl.zeros([LANES], tl.float32)
    state = (zero + LOWEST, zero, zero, tl.zeros([LANES], tl.int32))
    whole = V // (LANES * PER) * (LANES * PER)
    for start in range(0, whole, LANES * PER):
        state = _absorb(state, source, start, V, target, a_target, LANES, PER, False)
    top, total, shifted, beaten = _absorb(state, source, whole, V, target, a_target, LANES, PER, True)

    highest = tl.max(top, axis=0)
    rise, keep = _decay(top, highest, scale)
    row_total = tl.sum(keep * total, axis=0)
    log_sum = tl.log(row_total)
    entropy = log_sum - scale * (tl.sum(keep * (shifted + rise * total), axis=0) / row_total)
    largest = _finite(scale * highest)
    tl.store(logp_out + row, tl.where(target < 0, -largest, scale * (a_target - highest)) - log_sum)
    tl.store(entropy_out + row, _not_negative(entropy))
    tl.store(largest_out + row, largest)
    tl.store(log_sum_out + row, log_sum)
    tl.store(hit_out + row, (target >= 0) & ((tl.max(beaten, axis=0) | beaten_at_home) == 0))


@triton.jit
def _store(logits, columns, gradient, V, TAIL: tl.constexpr):
    gradient = gradient.to(logits.dtype.element_ty)
    if TAIL:
        tl.store(logits + columns, gradient, mask=columns < V)
    else:
        tl.store(logits + columns, gradient)


@triton.jit
def _replace(source, columns, V, target, stats, g_logp, g_entropy, TAIL: tl.constexpr):
    """Overwrite one block of logits with their gradient; `g_entropy` is None where it is zero."""
    entropy, largest, log_sum = stats
    a, slope = _capped(source, columns, V, TAIL)
    log_p = _finite(a * source[3]) - largest - log_sum
    factor = g_logp
    if g_entropy is not None:
        log_p = tl.where(log_p < NO_CHANCE, NO_CHANCE, log_p)
        factor += g_entropy * (log_p + entropy)
    dz = tl.where(columns == target, g_logp, 0.0) - tl.exp2(log_p * LOG2E) * factor
    _store(source[0], columns, dz * (slope * source[3]), V, TAIL)


@triton.jit
def grad_kernel(
    logits,
    targets,
    bias,
    entropies,
    largests,
    log_sums,
    g_logps,
    g_entropies,
    row_stride,
    V,
    softcap,
    scale,
    LANES: tl.constexpr,
    PER: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    source = (logits + row * row_stride, bias, softcap, scale)
    target = tl.load(targets + row).to(tl.int32)
    stats = (tl.load(entropies + row), tl.load(largests + row), tl.load(log_sums + row))
    g_logp = tl.load(g_logps + row)
    g_entropy = None
    if g_entropies is not None:
        g_entropy = tl.load(g_entropies + row)
    whole = V // (LANES * PER) * (LANES * PER)
    for start in range(0, whole, LANES * PER):
        _replace(source, _columns(start, LANES, PER), V, target, stats, g_logp, g_entropy, False)
    _replace(source, _columns(whole, LANES, PER), V, target, stats, g_logp, g_entropy, True)


# ---------------------------------------------------------------- divergence of two rows and its gradient


@triton.jit
def _accumulate(state, source, columns, V, TAIL: tl.constexpr):
    """Take one block into the running maximum and sum of exponentials of the lanes."""
    top, total = state
    _, new_top, _, e = _grow(top, source, columns, V, TAIL)
    _, keep = _decay(top, new_top, source[3])
    return new_top, keep * total + tl.sum(e, axis=1)


@triton.jit
def _log_partition(state, scale):
    top, total = state
    highest = tl.max(top, axis=0)
    _, keep = _decay(top, highest, scale)
    return _finite(scale * highest) + tl.log(tl.sum(keep * total, axis=0))


@triton.jit
def _log_probabilities(student, teacher, lse_s, lse_t, columns, V, TAIL: tl.constexpr):
    """Of the student and of the teacher, and the slope of the student's cap."""
    s, slope = _capped(student, columns, V, TAIL)
    t, _ = _capped(teacher, columns, V, TAIL)
    return s * student[3] - lse_s, t * teacher[3] - lse_t, slope


@triton.jit
def _log_mixture(log_p, log_q, mix):
    """log(beta q + (1 - beta) p); `mix` is (beta, log beta, log(1 - beta))."""
    a, b = log_p + mix[2], log_q + mix[1]
    return tl.maximum(a, b) + tl.log(1.0 + tl.exp2(-tl.abs(a - b) * LOG2E))


@triton.jit
def _share(log_p, log_other):
    """What each column adds to KL(p, other): nothing where p has no chance."""
    p = tl.exp2(log_p * LOG2E)
    return tl.where(p == 0.0, 0.0, p * (log_p - log_other))


@triton.jit
def _compare(sums, student, teacher, lse_s, lse_t, mix, columns, V, KIND: tl.constexpr, TAIL: tl.constexpr):
    """Add one block to the lanes' sums for the student's and the teacher's KL."""
    of_student, of_teacher = sums
    log_p, log_q, _ = _log_probabilities(student, teacher, lse_s, lse_t, columns, V, TAIL)
    if KIND == "fkl":
        of_teacher += tl.sum(_share(log_q, log_p), axis=1)
    elif KIND == "rkl":
        of_student += tl.sum(_share(log_p, log_q), axis=1)
    else:
        mixture = _log_mixture(log_p, log_q, mix)
        of_student += tl.sum(_share(log_p, mixture), axis=1)
        of_teacher += tl.sum(_share(log_q, mixture), axis=1)
    return of_student, of_teacher


@triton.jit
def divergence_kernel(
    logits_s,
    logits_t,
    bias_s,
    bias_t,
    value_out,
    inner_out,
    lse_s_out,
    lse_t_out,
    row_stride_s,
    row_stride_t,
    V,
    softcap_s,
    softcap_t,
    scale_s,
    scale_t,
    beta,
    log_beta,
    log_rest,
    KIND: tl.constexpr,
    LANES: tl.constexpr,
    PER: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    student = (logits_s + row * row_stride_s, bias_s, softcap_s, scale_s)
    teacher = (logits_t + row * row_stride_t, bias_t, softcap_t, scale_t)
    mix = (beta, log_beta, log_rest)
    zero = tl.zeros([LANES], tl.float32)
    of_s = (zero + LOWEST, zero)
    of_t = (zero + LOWEST, zero)
    whole = V // (LANES * PER) * (LANES * PER)
    for start in range(0, whole, LANES * PER):
        columns = _columns(start, LANES, PER)
        of_s = _accumulate(of_s, student, columns, V, False)
        of_t = _accumulate(of_t, teacher, columns, V, False)
    tail = _columns(whole, LANES, PER)
    lse_s = _log_partition(_accumulate(of_s, student, tail, V, True), scale_s)
    lse_t = _log_partition(_accumulate(of_t, teacher, tail, V, True), scale_t)

    sums = (zero, zero)
    for start in range(0, whole, LANES * PER):
        columns = _columns(start, LANES, PER)
        sums = _compare(sums, student, teacher, lse_s, lse_t, mix, columns, V, KIND, False)
    tail = _columns(whole, LANES, PER)
    sums = _compare(sums, student, teacher, lse_s, lse_t, mix, tail, V, KIND, True)
    inner = _not_negative(tl.sum(sums[0], axis=0))
    value = _not_negative(tl.sum(sums[1], axis=0))
    if KIND == "rkl":
        value = inner
    elif KIND == "jsd":
        value = beta * value + (1.0 - beta) * inner
    tl.store(value_out + row, value)
    tl.store(inner_out + row, inner)
    tl.store(lse_s_out + row, lse_s)
    tl.store(lse_t_out + row, lse_t)


@triton.jit
def _pull(student, teacher, lse_s, lse_t, inner, g, mix, columns, V, KIND: tl.constexpr, TAIL: tl.constexpr):
    """Overwrite one block of the student's logits with the gradient of the divergence."""
    log_p, log_q, slope = _log_probabilities(student, teacher, lse_s, lse_t, columns, V, TAIL)
    p = tl.exp2(log_p * LOG2E)
    if KIND == "fkl":
        dz = p - tl.exp2(log_q * LOG2E)
    elif KIND == "rkl":
        dz = tl.where(p == 0.0, 0.0, p * (log_p - log_q - inner))
    else:
        dz = tl.where(p == 0.0, 0.0, p * (log_p - _log_mixture(log_p, log_q, mix) - inner)) * (1.0 - mix[0])
    _store(student[0], columns, dz * (g * (slope * student[3])), V, TAIL)


@triton.jit
def divergence_grad_kernel(
    logits_s,
    logits_t,
    bias_s,
    bias_t,
    inners,
    lses_s,
    lses_t,
    gs,
    row_stride_s,
    row_stride_t,
    V,
    softcap_s,
    softcap_t,
    scale_s,
    scale_t,
    beta,
    log_beta,
    log_rest,
    KIND: tl.constexpr,
    LANES: tl.constexpr,
    PER: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    student = (logits_s + row * row_stride_s, bias_s, softcap_s, scale_s)
    teacher = (logits_t + row * row_stride_t, bias_t, softcap_t, scale_t)
    mix = (beta, log_beta, log_rest)
    lse_s, lse_t = tl.load(lses_s + row), tl.load(lses_t + row)
    inner, g = tl.load(inners + row), tl.load(gs + row)
    whole = V // (LANES * PER) * (LANES * PER)
    for start in range(0, whole, LANES * PER):
        columns = _columns(start, LANES, PER)
        _pull(student, teacher, lse_s, lse_t, inner, g, mix, columns, V, KIND, False)
    _pull(student, teacher, lse_s, lse_t, inner, g, mix, _columns(whole, LANES, PER), V, KIND, True)
