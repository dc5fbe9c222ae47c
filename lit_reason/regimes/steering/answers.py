"""Continuations of prompts, each steered by a mix of its own."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lit_reason.data.prompts import EvalPrompt
from lit_reason.errors import UserError
from lit_reason.regimes.steering.trial_run import Trying
from lit_reason.rollout.sampler import sample
from lit_reason.steering.config import SteerConfig
from lit_reason.steering.direction_file import Directions
from lit_reason.steering.hook import SteeringHook


def steered_answers(
    lm: Any,
    tokenizer: Any,
    directions: Directions,
    prompts: Sequence[EvalPrompt],
    how: Trying,
) -> list[dict[str, Any]]:
    """One record a continuation, in the order of the prompts, with what it was steered by.

    Args:
        lm: the language model.
        tokenizer: its tokenizer.
        directions: from a file.
        prompts: a prompt's own mix is the field `mix` of its row.
        how: settings; the mix of `how.steer` is for prompts that have none.

    Raises:
        UserError: a prompt has no mix, or a wrong one; nothing has been generated then.
    """
    together: dict[str, list[int]] = defaultdict(list)
    for number, prompt in enumerate(prompts):
        together[json.dumps(_mix(prompt, how.steer, directions))].append(number)
    records: dict[tuple[int, int], dict[str, Any]] = {}
    for text, numbers in together.items():
        mix = json.loads(text)
        hook = SteeringHook(lm.base, directions, replace(how.steer, mix=mix))
        with hook:
            ids = [prompts[n].ids for n in numbers]
            done = sample(lm, tokenizer, ids, how.sampling, stop_ids=how.stop_ids, progress=False)
        for c in done:
            number = numbers[c.prompt_index]
            records[number, c.sample_index] = {
                "row_id": prompts[number].row_id,
                "prompt": prompts[number].text,
                "sample": c.sample_index,
                "completion": c.text,
                "mix": mix,
                "strength": hook.strength,
            }
    return [records[at] for at in sorted(records)]


def _mix(prompt: EvalPrompt, steer: SteerConfig, directions: Directions) -> dict[str, float]:
    mix = prompt.metadata.get("mix", steer.mix)
    if not isinstance(mix, dict) or not all(_weight(value) for value in mix.values()):
        raise UserError(f"{prompt.row_id}: mix is {mix!r}; it must be weights by name of direction")
    if not mix:
        raise UserError(
            f"{prompt.row_id}: nothing says which directions to add; give --model.steer.mix '{{name: weight}}', or a "
            "field mix in the prompt's row"
        )
    try:
        for name in mix:
            directions.get(name)
    except UserError as error:
        raise UserError(f"{prompt.row_id}: {error}") from None
    return {name: float(weight) for name, weight in mix.items()}


def _weight(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
