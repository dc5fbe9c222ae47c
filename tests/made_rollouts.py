"""Rollouts made by hand, of two tokens a turn unless told otherwise."""

from __future__ import annotations

from typing import Any

from lit_reason.rollout.trajectory import NOT_SAMPLED, Trajectory


def rollout(turn_rewards=(0.0,), outcome=0.0, *, between=1, tokens=2, **fields: Any) -> Trajectory:
    """A prompt of one token, then each turn's tokens with some of the environment behind them.

    Args:
        turn_rewards: reward of each turn, under the name `r`.
        outcome: under the name `o`.
        between: tokens of the environment behind each turn.
        tokens: sampled tokens of each turn.
        fields: of the trajectory, in place of the defaults.
    """
    turn_id = [NOT_SAMPLED]
    for k in range(len(turn_rewards)):
        turn_id += [k] * tokens + [NOT_SAMPLED] * between
    made: dict[str, Any] = {
        "prompt": 0,
        "rollout": 0,
        "ids": list(range(2, 2 + len(turn_id))),
        "turn_id": turn_id,
        "logprob": [0.0 if k == NOT_SAMPLED else -0.5 for k in turn_id],
        "turn_terms": [{"r": r} for r in turn_rewards],
        "outcome_terms": {"o": outcome},
        "stops": ["end"] * len(turn_rewards),
        "finished": True,
        "policy_version": 0,
        "row_id": "x",
        "facts": {"errors": 0},
    }
    return Trajectory(**{**made, **fields})
