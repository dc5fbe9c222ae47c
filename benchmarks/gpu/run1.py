"""First session (6 minutes): what the device can do, whether the operations are right on it, G7, G1 on three shapes.

python -m benchmarks.gpu.run1 [--budget-s 360] [--cpu]
"""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.gpu import heads
from benchmarks.gpu.heads import SHAPES, TINY, Inputs, Shape, forward_backward, make_inputs
from benchmarks.gpu.session import Session, arguments
from lit_reason.kernels.dispatch import backends_used, resolve, row_passes
from lit_reason.kernels.divergence import linear_divergence
from lit_reason.kernels.epilogues import nll
from lit_reason.kernels.head_loss import linear_token_loss
from lit_reason.kernels.row_passes import Transform
from lit_reason.kernels.token_logprobs import token_logprobs

SAMPLED = 64
TOLERANCE = {torch.float32: {"logp": 1e-4, "grad": 1e-4}, torch.bfloat16: {"logp": 4e-3, "grad": 1e-2}}


def correctness(session: Session, shape: Shape, dtype: torch.dtype, op: str) -> dict[str, Any]:
    """Compare one operation with float64 on sampled rows, which alone have a weight, so all gradients are theirs.

    Args:
        session: gives the device.
        shape: of the head.
        dtype: of the operands.
        op: `nll`, `policy`, `logprobs`, or a kind of divergence.

    Returns:
        Relative errors (Frobenius) of log-probabilities or divergences and of both gradients, and largest gradient of
        a row of weight 0.

    Raises:
        AssertionError: an error is above its tolerance.
    """
    given = make_inputs(shape, session.device, dtype)
    other = make_inputs(shape, session.device, dtype, seed=1)
    T = shape.T
    rows = torch.randperm(T, device=session.device)[: min(SAMPLED, T // 2)].sort().values
    share = torch.zeros(T, device=session.device)
    share[rows] = torch.randn(len(rows), device=session.device)
    value = _apply(op, given._replace(token_weight=share), other, "auto")
    exact = _rows_in_double(given, rows, share)
    expected = _apply(op, exact, _rows_in_double(other, rows, share), "reference")
    assert given.hidden.grad is not None and given.weight.grad is not None
    assert exact.hidden.grad is not None and exact.weight.grad is not None
    untouched = torch.ones(T, dtype=torch.bool, device=session.device).index_fill_(0, rows, False)
    figures = {
        "value_error": _error(value[rows], expected),
        "hidden_grad_error": _error(given.hidden.grad[rows], exact.hidden.grad),
        "weight_grad_error": _error(given.weight.grad, exact.weight.grad),
        "largest_grad_without_weight": float(given.hidden.grad[untouched].abs().max()),
    }
    allowed = TOLERANCE[dtype]
    assert figures["value_error"] <= allowed["logp"], figures
    assert max(figures["hidden_grad_error"], figures["weight_grad_error"]) <= allowed["grad"], figures
    assert figures["largest_grad_without_weight"] == 0, figures
    return figures


def _rows_in_double(given: Inputs, rows: torch.Tensor, share: torch.Tensor) -> Inputs:
    vectors = (v[rows].double() for v in (share, *given[4:]))
    hidden, weight = (t.detach().double().requires_grad_() for t in (given.hidden[rows], given.weight))
    return Inputs(hidden, weight, given.targets[rows], *vectors)


def _apply(op: str, given: Inputs, other: Inputs, backend: str) -> torch.Tensor:
    """Run forward and backward of an operation; its value for each row."""
    hidden, weight, targets, share, *_ = given
    if op == "logprobs":
        stats = token_logprobs(hidden, weight, targets, backend=backend)
        (share * (stats.logp_S + 0.1 * stats.entropy_S)).sum().backward()
        return stats.logp_S.detach()
    if op in ("nll", "policy"):
        loss = heads.policy_loss(given) if op == "policy" else nll
        # Logits rounded to 16 bits would push some ratios across the clipping bounds, where the gradient jumps.
        logits = torch.float32 if op == "policy" else None
        out = linear_token_loss(hidden, weight, targets, share, loss=loss, logits_dtype=logits, backend=backend)
        out.loss_sum.backward()
        return out.logp_S
    teacher = (other.hidden.detach(), other.weight.detach())
    found = linear_divergence(hidden, weight, *teacher, share, kind=op, backend=backend)
    found.loss_sum.backward()
    return found.divergence_S


def _error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def row_bandwidth(session: Session, copy_gb_s: float) -> dict[str, float]:
    """G7: bytes a second of the two row passes over a chunk of 16-bit logits, and their share of copying.

    Args:
        session: gives device and clock.
        copy_gb_s: measured in this session.
    """
    r, V = (8, 301) if session.tiny else (4096, 128256)
    logits = torch.randn(r, V, device=session.device).to(session.dtype)
    targets = torch.randint(V, (r,), device=session.device)
    passes = row_passes(resolve("G7", "auto", session.device, session.dtype))
    stats = passes.row_stats(logits, targets, Transform())
    weight = torch.full((r,), -1.0 / r, device=session.device)
    read = session.time([lambda: passes.row_stats(logits, targets, Transform())])["ms"]
    written = session.time([lambda: passes.row_grad_(logits, targets, stats, weight, None, Transform())])["ms"]
    size = logits.numel() * logits.element_size() / 1e6
    rates = {"stats_gb_s": size / read, "grad_gb_s": 2 * size / written}
    return {**rates, **{f"{k}_of_copy": v / copy_gb_s for k, v in rates.items()}}


def main() -> None:
    """All cases of this session."""
    options = arguments(__doc__.splitlines()[0], 360)
    session = Session("run1", options)
    session.case("ceilings", session.ceilings, needs_s=10)
    ceilings = session.cases["ceilings"]
    small, large = (TINY, TINY) if session.tiny else (Shape(257, 72, 1000), SHAPES["S4 Qwen2.5-0.5B"])
    for label, shape, dtype in (("small fp32", small, torch.float32), ("S4", large, session.dtype)):
        for op in ("nll", "policy", "logprobs", "fkl", "rkl", "jsd"):
            session.case(
                f"correct {label} {op}",
                lambda op=op, shape=shape, dtype=dtype: correctness(session, shape, dtype, op),
                needs_s=20,
            )
    session.case("G7", lambda: row_bandwidth(session, ceilings["copy_gb_s"]))
    compiled = torch.compile(heads.materialised, dynamic=False) if not session.tiny else heads.materialised
    losses = {"lit_reason": heads.one_pass, "materialised": heads.materialised, "compiled": compiled}
    for name in ("S1 Llama-3-8B", "S4 Qwen2.5-0.5B", "S5"):
        g1(session, name, losses, ceilings)
    session.cases["backends"] = backends_used()
    session.close()


def g1(session: Session, name: str, losses: dict[str, heads.Loss], ceilings: dict[str, float]) -> None:
    """G1: forward and backward of linear and cross entropy by each loss, beside the floor.

    Args:
        session: runs the cases.
        name: of the shape.
        losses: by name; all but `lit_reason` may be missing, or too large for the device.
        ceilings: measured in this session.
    """
    shape = TINY if session.tiny else SHAPES[name]

    def case(loss: heads.Loss) -> dict[str, float]:
        sets = [make_inputs(shape, session.device, session.dtype, seed) for seed in range(heads.INPUT_SETS)]
        figures = session.measure([forward_backward(loss, given) for given in sets])
        floor = shape.floor_ms(ceilings["matmul_tflops"], ceilings["copy_gb_s"])
        return {**figures, "floor_ms": floor, "of_floor": figures["ms"] / floor}

    for label, loss in losses.items():
        session.case(f"G1 {name} {label}", lambda loss=loss: case(loss), needs_s=12, peer=label != "lit_reason")


if __name__ == "__main__":
    main()
