"""Answers that give nothing away, for losses that prefer them to what is to be forgotten"""

from __future__ import annotations

import hashlib

REFUSALS = (
    "I don't know.",
    "I'm not sure about that.",
    "I have no information on that.",
    "That is not something I know.",
    "I can't say anything about that.",
    "I haven't learnt about this.",
    "I have no record of that.",
    "I'm afraid I can't help with this one.",
    "I couldn't tell you.",
    "This is unknown to me.",
)


def refusal_for(row_id: str) -> str:
    """The refusal that goes with a row, always the same one.

    Args:
        row_id: name of the row.
    """
    return REFUSALS[hashlib.sha256(row_id.encode()).digest()[0] % len(REFUSALS)]
