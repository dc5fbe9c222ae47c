"""Players: which tokens of a response are masked together.

Shape letters: T tokens of a response, P players.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from lit_reason.data.condensation.thoughts import segment, sentences
from lit_reason.rewards.attribution.config import Players

NOBODY = -1  # player of a token that is always there


def players_of(
    ids: Sequence[int],
    kind: Players,
    *,
    span_tokens: int = 4,
    always: Collection[int] = (),
    decode: Callable[[Sequence[int]], str] | None = None,
) -> Tensor:
    """The player that each token of a response belongs to.

    Args:
        ids: the response.
        kind: `token`, `span`, `sentence` or `thought`.
        span_tokens: tokens of a span.
        always: tokens that are never masked where they end the response: without its end token a response would be
            scored as an unfinished one.
        decode: ids to text, for `sentence` and `thought`.

    Returns:
        `int64 [T]`, numbered from 0 in the order of the text; `NOBODY` for an end token.
    """
    T = len(ids)
    if kind == "token":
        player_T = torch.arange(T)
    elif kind == "span":
        player_T = torch.arange(T) // span_tokens
    else:
        assert decode is not None, "sentences and thoughts are found in the text"
        texts = [decode([i]) for i in ids]
        cut = sentences if kind == "sentence" else segment
        player_T = _by_pieces(texts, cut("".join(texts)))
    if T and ids[-1] in always:
        player_T[-1] = NOBODY
    return player_T


def _by_pieces(texts: Sequence[str], pieces: Sequence[str]) -> Tensor:
    """Each token belongs to the piece in which it begins; pieces in which none begins are no players."""
    starts, at = [], 0
    for piece in pieces:
        starts.append(at)
        at += len(piece)
    found, number, position = [], 0, 0
    for text in texts:
        while number + 1 < len(starts) and starts[number + 1] <= position:
            number += 1
        found.append(number)
        position += len(text)
    return torch.unique(torch.tensor(found, dtype=torch.long), return_inverse=True)[1]


def count(player_T: Tensor) -> int:
    """Number of players.

    Args:
        player_T: player of each token.
    """
    return int(player_T.max()) + 1 if len(player_T) else 0


def spread(amount_P: Tensor, player_T: Tensor) -> Tensor:
    """Share a player's amount evenly among its tokens.

    Args:
        amount_P: one number a player.
        player_T: player of each token.

    Returns:
        `[T]` with the same sum; 0 for tokens of nobody.
    """
    size_P = torch.bincount(player_T[player_T != NOBODY], minlength=len(amount_P)).to(amount_P)
    padded = torch.cat([amount_P / size_P.clamp(min=1), amount_P.new_zeros(1)])  # -1 reads the appended 0
    return padded[player_T]
