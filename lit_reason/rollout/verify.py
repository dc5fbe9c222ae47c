"""Rollouts from a ledger, checked again: are the marks consistent, and would the model still say so?

Shape letters: T tokens of a rollout.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

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
    for name, numbers in (("advantages", t.advantage), ("rewards of tokens", t.token_rewards)):
        if numbers and len(numbers) != T:
            found.append(f"{T} tokens, {len(numbers)} {name}")
        elif any(number and k == NOT_SAMPLED for number, k in zip(numbers, t.turn_id, strict=False)):
            found.append(f"{name} on tokens that were not sampled")
    paid = [*(value for terms in t.turn_terms for value in terms.values()), *t.outcome_terms.values()]
    if not all(math.isfinite(number) for number in (*paid, *t.logprob, *t.advantage, *t.token_rewards)):
        found.append("a reward, log-probability or advantage that is no finite number")
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


def unheard_stops(t: Trajectory, tokenizer: Any) -> list[str]:
    """Turns that ended by a stop string which their tokens do not hold.

    Args:
        t: a sound rollout.
        tokenizer: decodes its tokens.
    """
    return [
        f"turn {k} stopped by '{stop}', which its tokens do not hold"
        for k, stop in enumerate(t.stops)
        if stop not in ("end", "length") and stop not in _text(t, k, tokenizer)
    ]


def drifted(t: Trajectory, tokenizer: Any) -> tuple[int, int]:
    """How many turns would consist of other tokens if their text were tokenised again, and how many there are.

    No defect: it is why ids are kept. A trainer that renders the chat again trains on other tokens in this many turns.

    Args:
        t: a sound rollout.
        tokenizer: of the model.
    """
    turns = sorted(set(t.turn_id) - {NOT_SAMPLED})
    own = [[i for i, turn in zip(t.ids, t.turn_id, strict=True) if turn == k] for k in turns]
    again = [tokenizer(_text(t, k, tokenizer), add_special_tokens=False).input_ids for k in turns]
    return sum(a != b for a, b in zip(own, again, strict=True)), len(turns)


def _text(t: Trajectory, k: int, tokenizer: Any) -> str:
    ids = [i for i, turn in zip(t.ids, t.turn_id, strict=True) if turn == k]
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


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
