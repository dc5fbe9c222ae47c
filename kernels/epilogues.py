"""Losses of a token as functions of its log-probability and entropy, for `linear_token_loss`.

Shapes: S rows of the batch, r rows of one chunk.

An epilogue takes the `Tokens` of some rows and returns their loss terms, [r], or `Terms` with metrics beside. The
formula stands here once: its derivatives by log-probability and entropy are taken by autograd over these few numbers,
chunk by chunk, so a new loss is one function. It must be pure, and treat each row by itself; data of the batch is held
whole, [S], and indexed with `tokens.rows`. Weights and divisors belong into `token_weight_S` of the operation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from lit_reason.errors import UserError

EXPONENT_LIMIT = 20.0  # ratios of probabilities stay finite and exact up to exp(20)
LEAST_REST = 1e-6  # of 1 - p, below which unlikelihood would divide by rounding errors


class Tokens(NamedTuple):
    """What an epilogue sees: some rows of the batch.

    Args:
        logp_r: log-probability of each target; a derivative is taken by it.
        entropy_r: entropy of each row's distribution; a derivative is taken by it.
        rows: which rows of the batch these are.
        ref_logp_r: log-probability under the reference's hidden states, where they were given, without gradient.
    """

    logp_r: Tensor
    entropy_r: Tensor
    rows: slice
    ref_logp_r: Tensor | None = None

    def of(self, part: slice) -> Tokens:
        """Some of the batch's rows.

        Args:
            part: which ones.
        """
        ref = None if self.ref_logp_r is None else self.ref_logp_r[part]
        return Tokens(self.logp_r[part], self.entropy_r[part], part, ref)


class Terms(NamedTuple):
    """What an epilogue returns.

    Args:
        loss_r: loss of each row before its weight.
        metrics: numbers of each row to report, by name.
    """

    loss_r: Tensor
    metrics: Mapping[str, Tensor] = {}


Epilogue = Callable[[Tokens], Tensor | Terms]


def nll(tokens: Tokens) -> Tensor:
    """Negative log-likelihood, `-logp`."""
    return -tokens.logp_r


def dft(tokens: Tokens) -> Tensor:
    """Negative log-likelihood scaled by the token's own probability, `-sg(p) logp` (DFT, arXiv 2508.05629)."""
    return -tokens.logp_r.detach().exp() * tokens.logp_r


def unlikelihood(tokens: Tokens) -> Tensor:
    """`-log(1 - p)` (arXiv 1908.04319); 1 - p is taken as at least 1e-6, in the derivative too."""
    rest = -torch.expm1(tokens.logp_r)
    return -torch.log(rest + (rest.clamp(min=LEAST_REST) - rest).detach())


def ppo_clip(
    advantage_S: Tensor,
    old_logp_S: Tensor | None = None,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
) -> Epilogue:
    """Clipped surrogate of PPO and GRPO, `-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A)` (arXiv 1707.06347, eq. 7).

    With `dual_clip` c, terms of negative advantage are bounded by `-c A` (arXiv 1912.09729).

    Args:
        advantage_S: advantage A of each row.
        old_logp_S: log-probabilities under the policy that sampled; None means the present one, ratio r = 1.
        clip_low: room of the ratio below 1.
        clip_high: room of the ratio above 1.
        dual_clip: bound greater than 1, or None.

    Returns:
        Epilogue with metrics `ratio` and `clipped`.
    """

    def loss(tokens: Tokens) -> Terms:
        A, r = advantage_S[tokens.rows], _ratio(tokens, old_logp_S)
        gain = torch.minimum(r * A, r.clamp(1 - clip_low, 1 + clip_high) * A)
        if dual_clip is not None:
            gain = torch.where(A < 0, torch.maximum(gain, dual_clip * A), gain)
        clipped = ((A > 0) & (r > 1 + clip_high)) | ((A < 0) & (r < 1 - clip_low))
        return Terms(-gain, {"ratio": r, "clipped": clipped.to(r.dtype)})

    return loss


def cispo(advantage_S: Tensor, old_logp_S: Tensor | None = None, *, clip_high: float = 2.0) -> Epilogue:
    """`-sg(min(r, 1 + clip_high)) A logp`: the ratio is bounded, no token is dropped (CISPO, arXiv 2506.13585).

    Args:
        advantage_S: advantage A of each row.
        old_logp_S: log-probabilities under the policy that sampled; None means the present one.
        clip_high: room of the ratio above 1.

    Returns:
        Epilogue with metrics `ratio` and `clipped`.
    """

    def loss(tokens: Tokens) -> Terms:
        r = _ratio(tokens, old_logp_S).detach()
        bounded = r.clamp(max=1 + clip_high)
        metrics = {"ratio": r, "clipped": (r > 1 + clip_high).to(r.dtype)}
        return Terms(-bounded * advantage_S[tokens.rows] * tokens.logp_r, metrics)

    return loss


def reinforce(advantage_S: Tensor, importance_S: Tensor | None = None) -> Epilogue:
    """`-w A logp` with importance weights w that are constants.

    Args:
        advantage_S: advantage A of each row.
        importance_S: importance weight of each row, or None for 1.
    """
    coefficient_S = advantage_S if importance_S is None else advantage_S * importance_S
    return lambda tokens: -coefficient_S[tokens.rows] * tokens.logp_r


def k3_kl(beta: float, ref_logp_S: Tensor | None = None) -> Epilogue:
    """`beta (exp(d) - d - 1)` with `d = ref - logp`, an estimate of KL(policy, reference) that is never negative.

    d is taken as at most 20, where the derivative ends: a number larger than exp(20) is no estimate.

    Args:
        beta: factor.
        ref_logp_S: log-probabilities under the reference; None takes those of the reference's hidden states.

    Returns:
        Epilogue with metric `kl`, before beta.
    """

    def loss(tokens: Tokens) -> Terms:
        d = (_reference(tokens, ref_logp_S, "k3_kl") - tokens.logp_r).clamp(max=EXPONENT_LIMIT)
        kl = torch.expm1(d) - d
        return Terms(beta * kl, {"kl": kl})

    return loss


def k2_kl(beta: float, ref_logp_S: Tensor | None = None) -> Epilogue:
    """`beta d^2 / 2` with `d = ref - logp`: on samples of the policy its gradient is that of KL(policy, reference).

    Args:
        beta: factor.
        ref_logp_S: log-probabilities under the reference; None takes those of the reference's hidden states.

    Returns:
        Epilogue with metric `kl`, before beta.
    """

    def loss(tokens: Tokens) -> Terms:
        kl = 0.5 * (_reference(tokens, ref_logp_S, "k2_kl") - tokens.logp_r) ** 2
        return Terms(beta * kl, {"kl": kl})

    return loss


def entropy_bonus(coefficient: float) -> Epilogue:
    """`-coefficient * entropy`.

    Args:
        coefficient: size of the reward for entropy.
    """
    return lambda tokens: -coefficient * tokens.entropy_r


def total(*epilogues: Epilogue) -> Epilogue:
    """The sum of several epilogues, with the metrics of all.

    Args:
        *epilogues: terms of the loss.
    """

    def loss(tokens: Tokens) -> Terms:
        parts = [terms_of(epilogue, tokens) for epilogue in epilogues]
        metrics = {name: vector for part in parts for name, vector in part.metrics.items()}
        return Terms(torch.stack([part.loss_r for part in parts]).sum(0), metrics)

    return loss


def terms_of(epilogue: Epilogue, tokens: Tokens) -> Terms:
    """What an epilogue says about some rows, checked.

    Args:
        epilogue: the formula.
        tokens: the rows.

    Raises:
        UserError: it did not return one number a row.
    """
    found = epilogue(tokens)
    terms = found if isinstance(found, Terms) else Terms(found)
    for name, vector in {"its loss": terms.loss_r, **terms.metrics}.items():
        if not isinstance(vector, Tensor) or vector.shape != tokens.logp_r.shape:
            what = f"of shape {tuple(vector.shape)}" if isinstance(vector, Tensor) else type(vector).__name__
            name_of = getattr(epilogue, "__qualname__", type(epilogue).__name__)
            raise UserError(
                f"linear_token_loss: loss '{name_of}': {name} is {what}; it must be one number for each of the "
                f"{tokens.logp_r.shape[0]} rows it was given (index data of the batch with tokens.rows)"
            )
    return terms


def derivatives(epilogue: Epilogue, tokens: Tokens, weight_r: Tensor) -> tuple[Tensor, Tensor | None]:
    """Derivatives of the weighted loss by log-probability and by entropy; None where it does not use the entropy.

    Args:
        epilogue: the formula.
        tokens: the rows.
        weight_r: their weights; the derivatives of a row of weight 0 are 0, even where the formula's are not finite.
    """
    with torch.enable_grad():
        logp, entropy = (v.detach().requires_grad_() for v in (tokens.logp_r, tokens.entropy_r))
        loss = terms_of(epilogue, tokens._replace(logp_r=logp, entropy_r=entropy)).loss_r
        found = (
            torch.autograd.grad(loss.sum(), (logp, entropy), allow_unused=True) if loss.requires_grad else (None,) * 2
        )
    by_logp, by_entropy = (None if g is None else torch.where(weight_r == 0, 0.0, weight_r * g) for g in found)
    return (torch.zeros_like(logp) if by_logp is None else by_logp), by_entropy


def _ratio(tokens: Tokens, old_logp_S: Tensor | None) -> Tensor:
    old = tokens.logp_r.detach() if old_logp_S is None else old_logp_S[tokens.rows]
    return (tokens.logp_r - old).clamp(-EXPONENT_LIMIT, EXPONENT_LIMIT).exp()


def _reference(tokens: Tokens, ref_logp_S: Tensor | None, name: str) -> Tensor:
    ref = tokens.ref_logp_r if ref_logp_S is None else ref_logp_S[tokens.rows]
    if ref is None:
        raise UserError(f"{name}: ref_logp_S is None and linear_token_loss got no hidden_ref_SD; give one of them")
    return ref
