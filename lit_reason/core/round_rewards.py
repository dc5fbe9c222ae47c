"""What a recipe adds to the rewards of rollouts before credit is assigned: costs of length and of divergence.

Shape letters: T tokens of a rollout.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from lit_reason.core.policy_config import PolicyConfig
from lit_reason.rollout.trajectory import NOT_SAMPLED, Trajectory


def length_paid(t: Trajectory, config: PolicyConfig, longest: int) -> Trajectory:
    """A rollout that pays for its length and for being cut off, each as a term of the outcome.

    Args:
        t: the rollout.
        config: `overlong_tokens`, `overlong_penalty`, and `truncated: penalise`.
        longest: most tokens of a rollout.
    """
    terms = {}
    if config.overlong_tokens:
        over = len(t.ids) - (longest - config.overlong_tokens)
        terms["overlong"] = -config.overlong_penalty * min(max(over / config.overlong_tokens, 0.0), 1.0)
    if config.truncated == "penalise" and not t.finished:
        terms["cut_off"] = -config.overlong_penalty
    if not terms or not t.sampled:
        return t
    if t.token_rewards:  # these stand in place of the outcome, so its last token pays
        last = max(i for i, k in enumerate(t.turn_id) if k != NOT_SAMPLED)
        paid = [r + sum(terms.values()) * (i == last) for i, r in enumerate(t.token_rewards)]
        return dataclasses.replace(t, token_rewards=paid)
    return dataclasses.replace(t, outcome_terms={**t.outcome_terms, **terms})


def divergence(t: Trajectory, ref_logp_T: Tensor, estimate: str) -> Tensor:
    """Estimate of KL(policy, reference) at each sampled token, `float64 [T]`, 0 elsewhere.

    Args:
        t: the rollout, with the log-probabilities it was sampled with.
        ref_logp_T: those under the reference; read on sampled tokens alone.
        estimate: `k1`, `k2` or `k3`.
    """
    sampled_T = torch.tensor(t.turn_id) != NOT_SAMPLED
    d_T = torch.where(sampled_T, ref_logp_T.double() - torch.tensor(t.logprob, dtype=torch.float64), 0.0)
    return {"k1": -d_T, "k2": 0.5 * d_T**2, "k3": torch.expm1(d_T) - d_T}[estimate]


def divergence_paid(t: Trajectory, kl_T: Tensor, weight: float) -> Trajectory:
    """A rollout whose turns pay for their divergence from the reference, as a term `kl` of each turn.

    Args:
        t: the rollout.
        kl_T: divergence at each token.
        weight: price of a nat.
    """
    if t.token_rewards:
        paid = [r - weight * kl for r, kl in zip(t.token_rewards, kl_T.tolist(), strict=True)]
        return dataclasses.replace(t, token_rewards=paid)
    turn_id_T = torch.tensor(t.turn_id)
    by_turn = [float(kl_T[turn_id_T == k].sum()) for k in range(len(t.turn_terms))]
    terms = [{**had, "kl": -weight * kl} for had, kl in zip(t.turn_terms, by_turn, strict=True)]
    return dataclasses.replace(t, turn_terms=terms)
