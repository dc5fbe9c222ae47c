"""The policy's loss on a pack of rollouts, as the recipe composes it: ratio, clip, importance, divergence, entropy.

Shape letters: S sampled tokens of a pack.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lit_reason.core.policy_config import PolicyConfig
from lit_reason.kernels import epilogues
from lit_reason.rollout.policy_pack import PolicyPack


def policy_loss(config: PolicyConfig, pack: PolicyPack, logp_S: Tensor | None = None) -> epilogues.Epilogue:
    """The loss of each sampled token as a function of its log-probability and entropy.

    Args:
        config: the recipe's.
        pack: the tokens.
        logp_S: their present log-probabilities, without gradient; needed where the ratio is a turn's or a sequence's.
    """
    advantage_S = pack.advantage
    old_S = pack.old_logp if pack.start_logp is None else pack.start_logp
    if config.importance != "none":
        advantage_S = advantage_S * importance_weight(config, pack)
    if config.ratio != "token":
        assert logp_S is not None
        old_S = level_old_logp(logp_S, old_S, pack.turn if config.ratio == "turn" else pack.rollout)
    if config.loss == "ppo":
        clip: Any = {"clip_low": config.clip_low, "clip_high": config.clip_high, "dual_clip": config.dual_clip}
        terms = [epilogues.ppo_clip(advantage_S, old_S, **clip)]
    elif config.loss == "cispo":
        terms = [epilogues.cispo(advantage_S, old_S, clip_high=config.clip_high)]
    else:
        terms = [epilogues.reinforce(advantage_S)]
    if pack.ref_logp is not None:
        divergence = epilogues.k2_kl if config.kl_estimate == "k2" else epilogues.k3_kl
        terms.append(divergence(config.kl, pack.ref_logp))
    if config.entropy:
        terms.append(epilogues.entropy_bonus(config.entropy))
    return epilogues.total(*terms)


def level_old_logp(logp_S: Tensor, old_S: Tensor, span_S: Tensor) -> Tensor:
    """Old log-probabilities that give every token of a span the span's ratio, the geometric mean of its tokens'.

    The value of the ratio is then the span's and its gradient the token's own, `s * grad logp`; averaged over the span
    that is the gradient of `s` itself (GSPO-token, arXiv 2507.18071, equation 14).

    Args:
        logp_S: present log-probabilities, without gradient.
        old_S: under the policy that sampled.
        span_S: number of the span that each token belongs to.
    """
    spans = int(span_S.max()) + 1 if len(span_S) else 0
    total = logp_S.new_zeros(spans).index_add(0, span_S, logp_S - old_S)
    count = logp_S.new_zeros(spans).index_add(0, span_S, torch.ones_like(logp_S))
    return logp_S - (total / count.clamp(min=1))[span_S]


def importance_weight(config: PolicyConfig, pack: PolicyPack) -> Tensor:
    """How much likelier the trainer makes each sampled token than the sampler did, capped, `[S]`.

    Args:
        config: level, cap, and what lies beyond the cap.
        pack: with `start_logp`, the trainer's log-probabilities when the round was played.
    """
    assert pack.start_logp is not None
    log_S = pack.start_logp - pack.old_logp
    if config.importance == "sequence":
        spans = int(pack.rollout.max()) + 1 if len(log_S) else 0
        log_S = log_S.new_zeros(spans).index_add(0, pack.rollout, log_S)[pack.rollout]
    weight_S = log_S.clamp(max=epilogues.EXPONENT_LIMIT).exp()
    if config.beyond_cap == "mask":
        return torch.where(weight_S > config.importance_cap, 0.0, weight_S)
    return weight_S.clamp(max=config.importance_cap)
