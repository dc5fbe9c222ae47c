"""Shapes, inputs and losses of the head benchmarks G1 to G4: ours and the peers'.

Shapes: T tokens, H width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lit_reason.kernels.divergence import linear_divergence
from lit_reason.kernels.epilogues import Epilogue, entropy_bonus, k3_kl, ppo_clip, total
from lit_reason.kernels.head_loss import linear_token_loss
from lit_reason.kernels.token_logprobs import token_logprobs

INPUT_SETS = 3  # timed in turn


class Shape(NamedTuple):
    """Tokens, width and vocabulary of a head."""

    T: int
    H: int
    V: int

    def floor_ms(self, tflops: float, copy_gb_s: float, passes: int = 6) -> float:
        """Least time of forward and backward: `passes` T V H operations and five passes over 16-bit logits.

        Args:
            tflops: measured rate of matrix products.
            copy_gb_s: measured rate of copying.
            passes: 6 where the logits are computed once, 8 where twice.
        """
        T, H, V = self
        return passes * T * V * H / tflops / 1e9 + 5 * 2 * T * V / copy_gb_s / 1e6


SHAPES = {
    "S1 Llama-3-8B": Shape(16384, 4096, 128256),
    "S2 Qwen2.5-7B": Shape(16384, 3584, 152064),
    "S3 Qwen2.5-1.5B": Shape(16384, 1536, 151936),
    "S4 Qwen2.5-0.5B": Shape(16384, 896, 151936),
    "S5": Shape(8192, 4096, 151936),
    "S6": Shape(16384, 2048, 248320),
}
TINY = Shape(48, 16, 301)


class Inputs(NamedTuple):
    """Hidden states and head weight, both with gradients, and what a loss wants to know of each token."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    token_weight: Tensor
    advantage: Tensor
    old: Tensor
    ref: Tensor


Loss = Callable[[Inputs], Tensor]


def make_inputs(shape: Shape, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Inputs:
    """Random inputs whose logits have a standard deviation of about 1.

    Args:
        shape: of the head.
        device: where.
        dtype: of hidden states and weight.
        seed: of all numbers.
    """
    rng = torch.Generator(device).manual_seed(seed)
    T, H, V = shape

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, device=device, generator=rng)

    return Inputs(
        normal(T, H).to(dtype).requires_grad_(),
        (normal(V, H) / H**0.5).to(dtype).requires_grad_(),
        torch.randint(V, (T,), device=device, generator=rng),
        torch.full((T,), 1 / T, device=device),
        normal(T),
        normal(T) * 0.3 - torch.tensor(float(V)).log().item() - 0.5,
        normal(T) * 0.3 - torch.tensor(float(V)).log().item() - 0.5,
    )


def forward_backward(loss: Loss, given: Inputs) -> Callable[[], None]:
    """A call that computes a loss and its gradients, and drops them."""

    def call() -> None:
        loss(given).backward()
        given.hidden.grad = given.weight.grad = None

    return call


def policy_loss(given: Inputs) -> Epilogue:
    """Clipped surrogate, divergence from a reference, entropy bonus."""
    return total(ppo_clip(given.advantage, given.old), k3_kl(0.04, given.ref), entropy_bonus(0.01))


# ---- ours ---------------------------------------------------------------------------------------------------------


def one_pass(given: Inputs) -> Tensor:
    """Weighted negative log-likelihood with the logits computed once."""
    return linear_token_loss(*given[:4]).loss_sum


def one_pass_policy(given: Inputs) -> Tensor:
    """The policy loss with the logits computed once."""
    return linear_token_loss(*given[:4], loss=policy_loss(given)).loss_sum


def recomputed_policy(given: Inputs) -> Tensor:
    """The policy loss from `token_logprobs`, whose backward pass computes the logits again."""
    stats = token_logprobs(*given[:3])
    return _policy(stats.logp_S, stats.entropy_S, given)


def recomputed_logp_entropy(given: Inputs) -> Tensor:
    """Log-probabilities and entropies, both with gradients."""
    stats = token_logprobs(*given[:3])
    return (given.advantage * stats.logp_S + 0.01 * stats.entropy_S).sum()


def _policy(logp: Tensor, entropy: Tensor, given: Inputs) -> Tensor:
    r = (logp - given.old).exp()
    gain = torch.minimum(r * given.advantage, r.clamp(0.8, 1.2) * given.advantage)
    d = given.ref - logp
    return (given.token_weight * (-gain + 0.04 * (d.expm1() - d) - 0.01 * entropy)).sum()


# ---- torch --------------------------------------------------------------------------------------------------------


def materialised(given: Inputs) -> Tensor:
    """Cross entropy over all logits."""
    return F.cross_entropy(F.linear(given.hidden, given.weight).float(), given.targets)


def materialised_logp_entropy(given: Inputs) -> Tensor:
    """Log-probabilities and entropies from all logits."""
    log_p = torch.log_softmax(F.linear(given.hidden, given.weight).float(), -1)
    logp = log_p.gather(1, given.targets[:, None])[:, 0]
    return (given.advantage * logp - 0.01 * (log_p.exp() * log_p).sum(-1)).sum()


def torch_chunked(given: Inputs) -> Tensor:
    """torch's own chunked operation (2.13 and later)."""
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(given.hidden, given.weight, given.targets, options=options)


# ---- peers; imported when they run, for they may be missing -------------------------------------------------------


def liger(given: Inputs) -> Tensor:
    """Liger's fused linear cross entropy in Triton."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(given.hidden, given.weight, given.targets)


def liger_scaled(given: Inputs) -> Tensor:
    """Liger's scaled cross entropy: CuTe on Hopper where its package is there."""
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction

    return LigerFusedLinearScaledCrossEntropyFunction.apply(given.hidden, given.weight, given.targets).mean()


def liger_scaled_logp_entropy(given: Inputs) -> Tensor:
    """The same with entropy."""
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction

    nll, entropy = LigerFusedLinearScaledCrossEntropyFunction.apply(*given[:3], 1.0, -100, 1, True)
    return (-given.advantage * nll + 0.01 * entropy).sum()


def cce(given: Inputs) -> Tensor:
    """Cut cross entropy with its gradient filter."""
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(given.hidden, given.weight, given.targets)


def cce_exact(given: Inputs) -> Tensor:
    """Cut cross entropy without the filter: the exact gradient."""
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(given.hidden, given.weight, given.targets, filter_eps=None)


def trl_logp_entropy(given: Inputs) -> Tensor:
    """TRL's chunked log-probabilities with entropy."""
    from trl.kernels import ChunkedLogProbFunction

    rows = (given.hidden, given.weight, None, given.targets)
    logp, entropy, *_ = ChunkedLogProbFunction.apply(*rows, 1.0, 32768, None, 1.0, ("log_probs", "entropy"))
    return (given.advantage * logp + 0.01 * entropy).sum()


# ---- divergences --------------------------------------------------------------------------------------------------


def divergence(student: Inputs, teacher: Inputs) -> Tensor:
    """Our Jensen-Shannon divergence of two heads."""
    heads = (student.hidden, student.weight, teacher.hidden, teacher.weight)
    return linear_divergence(*heads, student.token_weight, kind="jsd").loss_sum


def materialised_divergence(student: Inputs, teacher: Inputs) -> Tensor:
    """The same from all logits of both."""
    log_p = torch.log_softmax(F.linear(student.hidden, student.weight).float(), -1)
    with torch.no_grad():
        log_q = torch.log_softmax(F.linear(teacher.hidden, teacher.weight).float(), -1)
    mix = torch.logaddexp(log_p, log_q) - torch.tensor(2.0).log().item()
    return 0.5 * ((log_p.exp() * (log_p - mix)).sum(-1).mean() + (log_q.exp() * (log_q - mix)).sum(-1).mean())


def liger_divergence(student: Inputs, teacher: Inputs) -> Tensor:
    """Liger's fused divergence in Triton."""
    from liger_kernel.transformers.functional import liger_fused_linear_jsd

    return liger_fused_linear_jsd(student.hidden, student.weight, teacher.hidden.detach(), teacher.weight.detach())
