"""The table of operations: how each is called, what it must give, and how close, from which tests are generated.

A reference is written here a second time, from materialised float64 logits and autograd, and shares no code with the
operations. Add a row for a new operation or loss and every generated test covers it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lit_reason.kernels import epilogues
from lit_reason.kernels.divergence import linear_divergence
from lit_reason.kernels.head_loss import linear_token_loss
from lit_reason.kernels.token_logprobs import token_logprobs

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 2e-2}
NARROW = ("hidden", "weight", "bias", "hidden_t", "weight_t", "hidden_ref")  # cast to the case's dtype
LEAVES = ("hidden", "weight", "bias", "token_weight")


class Case(NamedTuple):
    """Sizes and settings of one input."""

    S: int = 37
    D: int = 8
    V: int = 129
    dtype: torch.dtype = torch.float64
    seed: int = 0
    scale: float = 1.0
    shift: float = 0.0
    bias: bool = True
    temperature: float = 1.0
    softcap: float | None = None
    chunk_rows: int | None = 10
    backend: str = "torch"


class Operator(NamedTuple):
    """One row of the table.

    `call` and `reference` take the inputs and settings and return outputs by name; `loss` is differentiated, and each
    other one has an entry a row.
    """

    name: str
    call: Callable[[dict[str, Any], dict[str, Any]], dict[str, Tensor]]
    reference: Callable[[dict[str, Any], Case], dict[str, Tensor]]


def inputs_of(case: Case) -> dict[str, Any]:
    """All that any operation of the table takes, in float64 but for the tensors whose dtype the case names."""
    g = torch.Generator().manual_seed(case.seed)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    S, D, V = case.S, case.D, case.V
    targets = torch.randint(0, V, (S,), generator=g)
    if S > 1:
        targets[0], targets[-1] = 0, V - 1
    x = {
        "hidden": draw(S, D) * case.scale,
        "weight": draw(V, D),
        "bias": draw(V) + case.shift if case.bias else None,
        "hidden_t": draw(S, D + 3) * case.scale,
        "weight_t": draw(V, D + 3),
        "hidden_ref": draw(S, D) * case.scale,
        "token_weight": draw(S),
        "advantage": draw(S),
        "importance": draw(S).exp(),
        "old_logp": -draw(S).abs() * 3 - 0.01,
        "ref_logp": -draw(S).abs() * 3 - 0.01,
        "targets": targets,
    }
    x["token_weight"][1::3] = 0.0
    wide = torch.float64 if case.dtype == torch.float64 else torch.float32
    for name, value in x.items():
        if value is not None and value.is_floating_point():
            x[name] = value.to(case.dtype if name in NARROW else wide)
    return x


def settings_of(case: Case) -> dict[str, Any]:
    """Keyword arguments that every operation has."""
    return {"temperature": case.temperature, "chunk_rows": case.chunk_rows, "backend": case.backend}


def z_of(hidden: Tensor, weight: Tensor, bias: Tensor | None, case: Case, softcap: float | None) -> Tensor:
    z = hidden.double() @ weight.double().T
    z = z if bias is None else z + bias.double()
    if softcap is not None:
        z = torch.where(z == -math.inf, z, softcap * torch.tanh(z / softcap))
    return z / case.temperature


def stats_of(z: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    log_p = torch.log_softmax(z, -1)
    entropy = -torch.where(log_p == -math.inf, 0.0, log_p.exp() * log_p.clamp(min=-1e300)).sum(-1)
    return log_p[torch.arange(len(targets)), targets], entropy, z.argmax(-1) == targets


def _logprobs(x, settings):
    out = token_logprobs(x["hidden"], x["weight"], x["targets"], bias=x["bias"], softcap=x["softcap"], **settings)
    loss = (out.logp_S * x["token_weight"] + out.entropy_S * x["advantage"]).sum()
    return {"loss": loss, "logp": out.logp_S, "entropy": out.entropy_S, "lse": out.lse_S, "hit": out.hit_S}


def _logprobs_reference(x, case):
    z = z_of(x["hidden"], x["weight"], x["bias"], case, x["softcap"])
    logp, entropy, hit = stats_of(z, x["targets"])
    loss = (logp * x["token_weight"] + entropy * x["advantage"]).sum()
    return {"loss": loss, "logp": logp, "entropy": entropy, "lse": torch.logsumexp(z, -1), "hit": hit}


def token_loss(name: str, make: Callable[[dict], Any], formula: Callable[[Tensor, Tensor, Tensor, dict], Tensor]):
    """A row for `linear_token_loss` with one epilogue, and the formula it must have."""

    def call(x, settings):
        out = linear_token_loss(
            x["hidden"],
            x["weight"],
            x["targets"],
            x["token_weight"],
            loss=make(x),
            bias=x["bias"],
            softcap=x["softcap"],
            hidden_ref_SD=x["hidden_ref"],
            **settings,
        )
        return {
            "loss": out.loss_sum,
            "logp": out.logp_S,
            "entropy": out.entropy_S,
            "hit": out.hit_S,
            "ref_logp": out.metrics["ref_logp"],
        }

    def reference(x, case):
        logp, entropy, hit = stats_of(z_of(x["hidden"], x["weight"], x["bias"], case, x["softcap"]), x["targets"])
        z_ref = z_of(
            x["hidden_ref"], x["weight"].detach(), None if x["bias"] is None else x["bias"].detach(), case, x["softcap"]
        )
        ref_logp = stats_of(z_ref, x["targets"])[0]
        loss = (x["token_weight"] * formula(logp, entropy, ref_logp, x)).sum()
        return {"loss": loss, "logp": logp, "entropy": entropy, "hit": hit, "ref_logp": ref_logp}

    return Operator(name, call, reference)


def _clipped(logp, x, low, high, dual=None):
    r = (logp - x["old_logp"]).clamp(-20, 20).exp()
    gain = torch.minimum(r * x["advantage"], r.clip(1 - low, 1 + high) * x["advantage"])
    return gain if dual is None else torch.where(x["advantage"] < 0, torch.maximum(gain, dual * x["advantage"]), gain)


def _cispo(logp, x, high):
    return (logp - x["old_logp"]).clamp(-20, 20).exp().clip(max=1 + high).detach() * x["advantage"] * logp


def _k3(d):
    d = d.clip(max=20)
    return d.exp() - d - 1


def divergence(kind: str, beta: float = 0.5) -> Operator:
    """A row for `linear_divergence`."""

    def call(x, settings):
        out = linear_divergence(
            x["hidden"],
            x["weight"],
            x["hidden_t"],
            x["weight_t"],
            x["token_weight"],
            kind=kind,
            beta=beta,
            bias_s=x["bias"],
            softcap_s=x["softcap"],
            **settings,
        )
        return {"loss": out.loss_sum, "divergence": out.divergence_S}

    def reference(x, case):
        log_p = torch.log_softmax(z_of(x["hidden"], x["weight"], x["bias"], case, x["softcap"]), -1)
        log_q = torch.log_softmax(z_of(x["hidden_t"], x["weight_t"], None, case, None), -1)
        kl = lambda a, b: (a.exp() * (a - b)).sum(-1)  # noqa: E731
        m = torch.logaddexp(log_p + math.log(1 - beta), log_q + math.log(beta))
        values = {
            "fkl": lambda: kl(log_q, log_p),
            "rkl": lambda: kl(log_p, log_q),
            "jsd": lambda: beta * kl(log_q, m) + (1 - beta) * kl(log_p, m),
        }
        found = values[kind]()
        return {"loss": (x["token_weight"] * found).sum(), "divergence": found}

    return Operator(f"{kind} {beta}" if kind == "jsd" else kind, call, reference)


OPERATORS = [
    Operator("token_logprobs", _logprobs, _logprobs_reference),
    token_loss("nll", lambda x: epilogues.nll, lambda logp, H, ref, x: -logp),
    token_loss("dft", lambda x: epilogues.dft, lambda logp, H, ref, x: -logp.exp().detach() * logp),
    token_loss(
        "unlikelihood",
        lambda x: epilogues.unlikelihood,
        lambda logp, H, ref, x: -torch.log((1 - logp.exp()).clamp(min=1e-6)),
    ),
    token_loss(
        "ppo_clip",
        lambda x: epilogues.ppo_clip(x["advantage"], x["old_logp"], clip_low=0.2, clip_high=0.3),
        lambda logp, H, ref, x: -_clipped(logp, x, 0.2, 0.3),
    ),
    token_loss(
        "ppo_clip on policy",
        lambda x: epilogues.ppo_clip(x["advantage"]),
        lambda logp, H, ref, x: -(logp - logp.detach()).exp() * x["advantage"],
    ),
    token_loss(
        "ppo_clip dual",
        lambda x: epilogues.ppo_clip(x["advantage"], x["old_logp"], dual_clip=3.0),
        lambda logp, H, ref, x: -_clipped(logp, x, 0.2, 0.2, 3.0),
    ),
    token_loss(
        "cispo",
        lambda x: epilogues.cispo(x["advantage"], x["old_logp"], clip_high=0.4),
        lambda logp, H, ref, x: -_cispo(logp, x, 0.4),
    ),
    token_loss(
        "reinforce",
        lambda x: epilogues.reinforce(x["advantage"], x["importance"]),
        lambda logp, H, ref, x: -x["importance"] * x["advantage"] * logp,
    ),
    token_loss("k3_kl", lambda x: epilogues.k3_kl(0.3), lambda logp, H, ref, x: 0.3 * _k3(ref - logp)),
    token_loss("entropy_bonus", lambda x: epilogues.entropy_bonus(0.7), lambda logp, H, ref, x: -0.7 * H),
    token_loss(
        "total",
        lambda x: epilogues.total(
            epilogues.cispo(x["advantage"], x["old_logp"], clip_high=0.4),
            epilogues.k3_kl(0.1, x["ref_logp"]),
            epilogues.entropy_bonus(0.2),
        ),
        lambda logp, H, ref, x: -_cispo(logp, x, 0.4) + 0.1 * _k3(x["ref_logp"] - logp) - 0.2 * H,
    ),
    token_loss(
        "own function",
        lambda x: lambda t: t.entropy_r.square() * x["advantage"][t.rows] - t.logp_r.exp(),
        lambda logp, H, ref, x: H.square() * x["advantage"] - logp.exp(),
    ),
    divergence("fkl"),
    divergence("rkl"),
    *(divergence("jsd", beta) for beta in (0.1, 0.5, 0.9)),
]
BY_NAME = {operator.name: operator for operator in OPERATORS}


def run(call: Callable, x: dict[str, Any], second: Any) -> dict[str, Tensor]:
    """Outputs and gradients of one call, as a flat dict."""
    leaves = {name: x[name].detach().clone().requires_grad_() for name in LEAVES if x[name] is not None}
    out = call(x | leaves, second)
    grads = torch.autograd.grad(out["loss"], list(leaves.values()), allow_unused=True)
    zeros = zip(leaves.items(), grads, strict=True)
    found = {"d_" + name: torch.zeros_like(leaf) if grad is None else grad for (name, leaf), grad in zeros}
    return {name: value.detach() for name, value in out.items()} | found


def ours(operator: Operator, case: Case, **changes: Any) -> dict[str, Tensor]:
    """What the operation gives for a case, with inputs changed."""
    return run(operator.call, inputs_of(case) | {"softcap": case.softcap} | changes, settings_of(case))


def theirs(operator: Operator, case: Case, **changes: Any) -> dict[str, Tensor]:
    """What the reference gives for the same numbers in float64."""
    x = inputs_of(case) | {"softcap": case.softcap} | changes
    wide = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in x.items()}
    return run(operator.reference, wide, case)


def compare(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float) -> None:
    """Equal names and shapes, no NaN, and a small relative error of each tensor as a whole; signed sums may cancel."""
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert got[name].shape == value.shape, name
        if value.dtype == torch.bool:
            assert torch.equal(got[name], value), name
            continue
        gap = float((got[name].double() - value).norm())
        assert gap <= tolerance * max(float(value.norm()), 1.0 if name == "loss" else 0.1), (
            name,
            gap,
            float(value.norm()),
        )


def check(operator: Operator, case: Case) -> None:
    """An operation gives what its reference gives, forward and backward."""
    want = theirs(operator, case)
    got = ours(operator, case)
    if case.dtype in (torch.bfloat16, torch.float16):
        want.pop("hit", None), got.pop("hit", None)  # rounded logits tie
    compare(got, want, TOLERANCE[case.dtype])
