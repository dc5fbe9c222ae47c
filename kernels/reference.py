"""The head-loss family in its plainest form: all logits at once, differentiated by autograd.

Shapes: S rows, D width, V vocabulary.

This is the `reference` backend, against which the chunked paths are tested; chunk by chunk under a checkpoint it is
also the path that can be differentiated twice.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from lit_reason.kernels.chunks import Settings


def logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, settings: Settings) -> Tensor:
    """Capped and tempered logits of all rows, [S, V]; their softmax is the distribution.

    Args:
        hidden: rows, [S, D].
        weight: head weight, [V, D].
        bias: head bias, [V], or None.
        settings: cap, temperature, and dtypes of the product and of what follows.
    """
    z = F.linear(hidden.to(settings.compute), weight.to(settings.compute)).to(settings.stats)
    if bias is not None:
        z = z + bias
    if settings.softcap is not None:
        z = torch.where(z == -math.inf, z, settings.softcap * torch.tanh(z / settings.softcap))
    return z * settings.inverse_temperature


def token_stats(z: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probability, entropy, log of the partition sum, and whether the target is the first of the largest logits.

    Args:
        z: logits, [S, V].
        targets: tokens, [S].
    """
    log_p = torch.log_softmax(z, dim=-1)
    logp = log_p.gather(1, targets.long()[:, None])[:, 0]
    entropy = -(log_p.exp() * log_p.masked_fill(log_p == -math.inf, 0.0)).sum(-1)
    return logp, entropy, torch.logsumexp(z, -1), z.argmax(-1) == targets


def divergence(z_s: Tensor, z_t: Tensor, kind: str, beta: float) -> Tensor:
    """Divergence between student and teacher in each row, [S].

    Args:
        z_s: the student's logits, [S, V].
        z_t: the teacher's.
        kind: `fkl`, `rkl` or `jsd`.
        beta: share of the teacher in the mixture of `jsd`.
    """
    log_p, log_q = torch.log_softmax(z_s, -1), torch.log_softmax(z_t, -1)
    if kind == "fkl":
        return _kl(log_q, log_p)
    if kind == "rkl":
        return _kl(log_p, log_q)
    mixture = torch.logaddexp(log_p + math.log(1 - beta), log_q + math.log(beta))
    return beta * _kl(log_q, mixture) + (1 - beta) * _kl(log_p, mixture)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    p = log_p.exp()
    return torch.where(p == 0, 0.0, p * (log_p - log_q)).sum(-1)
