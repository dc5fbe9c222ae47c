"""Rollouts from a ledger, checked again: are the marks consistent, and would the model still say so?

Shape letters: T tokens of a rollout.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from lit_reason.models.language_model import LanguageModel
from lit_reason.rollout.trajectory import NOT_SAMPLED, Trajectory


def inconsistencies(t: Trajectory, stop_ids: Sequence[int] = ()) -> list[str]:
    """What is wrong with the marks of a rollout; a sound one has an empty list.

    Args:
        t: the rollout.
        stop_ids: tokens that end a turn; with them the ends of turns are checked too.
    """
    T, found = len(t.ids), []
    if len(t.turn_id) != T or len(t.logprob) != T:
        return [f"{T} tokens, {len(t.turn_id)} turn ids, {len(t.logprob)} log-probabilities"]
    turns = [k for k in t.turn_id if k != NOT_SAMPLED]
    if turns and t.turn_id[0] != NOT_SAMPLED:
        found.append("the first token is marked as sampled: nothing can have predicted it")
    if any(b < a for a, b in pairwise(turns)):
        found.append("turns are not in order")
    if len(t.stops) != len(t.turn_terms) or (turns and max(turns) >= len(t.stops)):
        found.append(
            f"{len(t.stops)} stops, {len(t.turn_terms)} turns with rewards, tokens of turn {max(turns, default=-1)}"
        )
        return found
    for k in sorted(set(turns)):
        at = [i for i, turn in enumerate(t.turn_id) if turn == k]
        if at[-1] - at[0] + 1 != len(at):
            found.append(f"turn {k} is torn by tokens that were not sampled")
        if stop_ids and (t.stops[k] == "end") != (t.ids[at[-1]] in stop_ids):
            found.append(f"turn {k} stopped by '{t.stops[k]}' but its last token is {t.ids[at[-1]]}")
    wrong = [
        i for i, (k, p) in enumerate(zip(t.turn_id, t.logprob, strict=True)) if (k == NOT_SAMPLED and p) or p > 1e-6
    ]
    if wrong:
        found.append(f"token {wrong[0]}: a log-probability of {t.logprob[wrong[0]]:g} in turn {t.turn_id[wrong[0]]}")
    return found


@torch.no_grad()
def gaps(lm: LanguageModel, t: Trajectory, temperature: float = 1.0) -> Tensor:
    """How far each sampled token's log-probability is from what a model says now.

    Args:
        lm: the model, in eval mode.
        t: a sound rollout.
        temperature: that it was sampled with.

    Returns:
        `[sampled]` absolute differences in nats; near 0 for the weights that sampled it.
    """
    ids_T = torch.tensor(t.ids, device=lm.device)
    sampled = (torch.tensor(t.turn_id) != NOT_SAMPLED).nonzero().squeeze(1)
    hidden = lm.hidden(ids_T, torch.arange(len(ids_T), device=lm.device), torch.tensor([0, len(ids_T)]))
    now = lm.head(hidden[sampled - 1], ids_T[sampled], temperature=temperature).logp_S.cpu()
    return (now - torch.tensor(t.logprob)[sampled]).abs()
