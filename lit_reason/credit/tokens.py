"""From turns to tokens: where a turn's reward is paid, who gets a turn's advantage, and rules that work token by token.

Tokens that the environment wrote are no steps of time: the token that follows a turn's last one is the first of the
next turn, whatever stands between. A turn ends where its tokens end, whether or not it was rewarded. A token's turn id
is negative where the policy did not sample it.

Shape letters: T tokens of one rollout, environment's included; A of them sampled by the policy; K turns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lit_reason.credit.rewards import to_go
from lit_reason.errors import UserError


def per_token(advantage_K: Tensor, turn_id_T: Tensor) -> Tensor:
    """Every sampled token gets its turn's advantage.

    Args:
        advantage_K: one number a turn, at least as many as there are turns.
        turn_id_T: turn that sampled each token, negative elsewhere.

    Returns:
        `[T]`, 0 on tokens that were not sampled.
    """
    sampled_T = turn_id_T >= 0
    return torch.where(sampled_T, advantage_K[turn_id_T.clamp(min=0)], torch.zeros_like(advantage_K[:1]))


def token_rewards(due_K: Tensor, turn_id_T: Tensor) -> Tensor:
    """Pay each turn's reward at its last token (MT-PPO, arXiv 2505.11821 v2).

    Args:
        due_K: what falls due at the end of each turn, the outcome included (`GroupRewards.due_GK[i]`).
        turn_id_T: turn that sampled each token, negative elsewhere.

    Returns:
        `[T]`, 0 everywhere but at the last sampled token of each turn.

    Raises:
        UserError: a reward is due for a turn that sampled no token.
    """
    reward_T = due_K.new_zeros(turn_id_T.shape[0])
    for k, due in enumerate(due_K.tolist()):
        at = (turn_id_T == k).nonzero()
        if len(at):
            reward_T[at[-1]] = due
        elif due:
            raise UserError(f"turn {k} is due a reward of {due:g} but sampled no token that could earn it")
    return reward_T


def gae(reward_T: Tensor, value_T: Tensor, turn_id_T: Tensor, *, gamma: float = 1.0, lam: float = 1.0) -> Tensor:
    """Generalised advantage estimation over the sampled tokens (arXiv 1506.02438, equation 16).

    `delta_t = r_t + gamma V_next - V_t`, `A_t = delta_t + gamma lam A_next`, where "next" is the next *sampled* token
    and both are 0 after the last one.

    Args:
        reward_T: reward paid at each token.
        value_T: the critic's value of the state in which each token was sampled; read on sampled tokens alone.
        turn_id_T: turn that sampled each token, negative elsewhere.
        gamma: discount a token, in [0, 1].
        lam: 0 trusts the critic's next value, 1 the return.

    Returns:
        `[T]`, 0 on tokens that were not sampled. Add `value_T` for the critic's targets.
    """
    at_A = (turn_id_T >= 0).nonzero().squeeze(1)
    value_A = value_T[at_A]
    delta_A = reward_T[at_A] + gamma * _shifted(value_A) - value_A
    return torch.zeros_like(value_T).index_put((at_A,), to_go(delta_A, gamma * lam))


def bilevel_gae(
    reward_T: Tensor,
    value_T: Tensor,
    turn_id_T: Tensor,
    *,
    gamma: float = 1.0,
    lam: float = 1.0,
    turn_gamma: float = 1.0,
    turn_lam: float = 1.0,
) -> Tensor:
    """Advantages over turns first, then over the tokens inside each turn (as in RAGEN, arXiv 2504.20073).

    The chain of turns runs over their last tokens with their own discount; what comes out is the advantage of each last
    token, from which ordinary GAE runs back to the turn's first. With all four factors 1 it equals `gae`, if rewards
    stand at the ends of turns.

    Args:
        reward_T: reward paid at each token; those within a turn count for the tokens up to them.
        value_T: the critic's value of the state in which each token was sampled.
        turn_id_T: turn that sampled each token, negative elsewhere.
        gamma: discount a token within a turn.
        lam: trace of the tokens within a turn.
        turn_gamma: discount a turn.
        turn_lam: trace of the turns.

    Returns:
        `[T]`, 0 on tokens that were not sampled.
    """
    spans = [(turn_id_T == k).nonzero().squeeze(1) for k in range(int(turn_id_T.max()) + 1)]
    spans = [span for span in spans if len(span)]
    last = torch.stack([span[-1] for span in spans])
    delta_K = reward_T[last] + turn_gamma * _shifted(value_T[last]) - value_T[last]
    advantage_K = to_go(delta_K, turn_gamma * turn_lam)
    advantage_T = torch.zeros_like(value_T)
    for span, at_end in zip(spans, advantage_K, strict=True):
        value_A = value_T[span]
        delta_A = reward_T[span] + gamma * _shifted(value_A) - value_A
        delta_A = torch.cat([delta_A[:-1], at_end[None]])
        advantage_T[span] = to_go(delta_A, gamma * lam)
    return advantage_T


def whitened(
    values: Sequence[Tensor],
    turn_ids: Sequence[Tensor],
    *,
    everyones: Callable[[Tensor], Sequence[Tensor]] = lambda own: [own],
    eps: float = 1e-8,
) -> list[Tensor]:
    """Mean 0 and deviation 1 over all sampled tokens of the whole batch, as REINFORCE++ has it (arXiv 2501.03262).

    Args:
        values: one `[T]` a rollout.
        turn_ids: for each rollout the turn that sampled each token, negative elsewhere.
        everyones: the same of all processes, from that of one; default: there is one.
        eps: added to the standard deviation.

    Returns:
        One `[T]` a rollout, 0 on tokens that were not sampled.
    """
    masks = [ids >= 0 for ids in turn_ids]
    own = torch.cat([value[mask] for value, mask in zip(values, masks, strict=True)])
    sampled = torch.cat(list(everyones(own)))
    mean, deviation = sampled.mean(), sampled.std() if len(sampled) > 1 else sampled.new_zeros(())
    return [(value - mean) / (deviation + eps) * mask for value, mask in zip(values, masks, strict=True)]


def _shifted(value: Tensor) -> Tensor:
    """The value one step later; 0 after the end."""
    return torch.cat([value[1:], value.new_zeros(1)])
