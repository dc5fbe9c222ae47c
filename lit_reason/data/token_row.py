"""TokenRow: the one datum that data, regimes, kernels and reports share. Shape letters: T tokens of one row."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np


class Segment(IntEnum):
    """What a token is part of. Loss weights and metrics are given per segment, by lower-case name."""

    PROMPT = 0  # system, user, tool results, template scaffolding: never trained
    MARKER = 1  # think markers, opening and closing
    UNDERSTANDING = 2  # thoughts from the head edge of the full trace
    EXPLORATION = 3  # thoughts from its middle
    CONVERGENCE = 4  # thoughts from its tail edge
    SEAM = 5  # the first tokens after a cut (data.render: seam_tokens)
    SOLUTION = 6  # assistant text after the closing marker, or all of it when there is no trace
    END = 7  # the end-of-turn token
    TOOL_CALL = 8  # a tool call written by the assistant
    TEXT = 9  # plain documents


SEGMENT_NAMES: tuple[str, ...] = tuple(s.name.lower() for s in Segment)

DECILE_NONE = -1  # a token outside any thought


@dataclass(frozen=True)
class TokenRow:
    """One training example in tokens.

    Attributes:
        ids: `int32 [T]` token ids, first token to last.
        weight: `float32 [T]` loss weight of *predicting* this token from those before it; 0 = not trained.
            `weight[0]` is always 0.
        segment: `uint8 [T]` values of `Segment`.
        decile: `int8 [T]` decile (0..9) of the token's thought in the *full* trace, -1 outside thoughts.
        row_id: the conversation's row id (`#k` is appended where one conversation gives several rows).
        text_bytes: UTF-8 bytes of the text that the trained tokens stand for; 0 where nobody counted them.
    """

    ids: np.ndarray
    weight: np.ndarray
    segment: np.ndarray
    decile: np.ndarray
    row_id: str
    text_bytes: int = 0

    def __len__(self) -> int:
        return len(self.ids)
