"""How much each kind of token counts in the loss: a recipe's `render.weights` as a table over all segments."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from lit_reason.data.token_row import SEGMENT_NAMES, Segment
from lit_reason.errors import UserError, did_you_mean


def segment_weights(weights: Mapping[str, float]) -> np.ndarray:
    """Loss weight of each segment: `float32 [number of segments]`, indexed by `Segment`.

    Args:
        weights: weight by lower-case segment name; a segment that is not named has weight 1, the prompt 0.

    Raises:
        UserError: an unknown name, a weight that is not a finite number >= 0, or one for the prompt.
    """
    table = np.ones(len(SEGMENT_NAMES), dtype=np.float32)
    table[Segment.PROMPT] = 0.0
    trainable = SEGMENT_NAMES[1:]
    for name, value in weights.items():
        if name not in trainable:
            hint = did_you_mean(name, trainable)
            reason = "the prompt is never trained" if name == SEGMENT_NAMES[0] else f"no such segment{hint}"
            raise UserError(f"render.weights: '{name}': {reason}; allowed: {', '.join(trainable)}")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
            raise UserError(f"render.weights: {name} is {value!r}; a weight is a finite number >= 0")
        table[SEGMENT_NAMES.index(name)] = value
    return table
