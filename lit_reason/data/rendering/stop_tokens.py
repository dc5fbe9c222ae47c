"""Which tokens end a turn, and which token may pad."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

_PADDING_NAMES = ("pad", "reserved", "unused", "extra", "fim", "filler", "placeholder")


def known_stop_ids(tokenizer: Any, generation_eos: int | Sequence[int] | None = None) -> tuple[int, ...]:
    """End-of-sequence ids of the tokenizer and of the model's generation config.

    Args:
        tokenizer: any tokenizer.
        generation_eos: `eos_token_id` of a generation config.

    Returns:
        Ids without repetition; empty when neither names one.
    """
    more: Iterable[int] = generation_eos if isinstance(generation_eos, Sequence) else (generation_eos,)  # type: ignore[assignment]
    return tuple(dict.fromkeys(i for i in (tokenizer.eos_token_id, *more) if i is not None))


def choose_pad_id(tokenizer: Any, stop_ids: Sequence[int]) -> int:
    """A padding token that is no end token.

    A student whose padding token is its end token never learns to stop wherever labels are masked by the
    padding id. The losses here mask by position, so they are safe either way; other programs that load the
    exported model may not be.

    Args:
        tokenizer: any tokenizer.
        stop_ids: ids that end a turn.

    Returns:
        The tokenizer's own padding token if it ends no turn; else its unknown token; else an added token
        meant for padding or reserved; and when there is none of these, an end token after all.
    """
    stops = set(stop_ids)
    added = sorted(tokenizer.added_tokens_decoder.items())
    spare = [i for i, token in added if token.special and any(n in token.content.lower() for n in _PADDING_NAMES)]
    for candidate in (tokenizer.pad_token_id, tokenizer.unk_token_id, *spare):
        if candidate is not None and candidate not in stops:
            return int(candidate)
    return int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else next(iter(stop_ids), 0))
