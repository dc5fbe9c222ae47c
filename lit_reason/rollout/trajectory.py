"""A rollout in tokens: who wrote each of them, how likely it was, and what each turn was worth.

Shape letters: T tokens, K turns of the model.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lit_reason.data.token_row import DECILE_NONE, Segment, TokenRow
from lit_reason.errors import UserError

NOT_SAMPLED = -1  # turn of a token that the prompt or the environment wrote


@dataclass(frozen=True)
class Trajectory:
    """One rollout, complete: what loss, reports and a later check need, and no text that could drift from the ids.

    Attributes:
        prompt: number of the prompt in its batch; rollouts of one prompt are a group.
        rollout: number of the rollout in its group.
        ids: all tokens, prompt first, in the order in which the model saw them.
        turn_id: for each token the turn that sampled it, `NOT_SAMPLED` elsewhere.
        logprob: log-probability with which each token was sampled, 0 where it was not.
        turn_terms: rewards of each turn by name.
        outcome_terms: rewards of the whole by name.
        stops: how each turn ended: `end`, `length`, or its stop string.
        finished: the environment ended the dialogue; False when a limit cut it off.
        policy_version: number of policy updates before these tokens were sampled.
        row_id: name of the task's record.
        failure: what the environment itself failed with; such a rollout is not trained on.
        facts: counts for reports: `calls` of tools that ran, `errors`, `cut_observations`.
        token_rewards: reward paid at each token, 0 where none was sampled; they stand in place of the rewards of turns
            and outcome and add up to them. Empty: rewards are paid by turn.
        advantage: what each token was worth to the loss by the method's credit rule; empty where none was given.
        sampler: what sampled: `own`, `continuous`, `server`.
        scorer: whose `logprob` is: the `sampler`'s own, or that of a forward pass by the `trainer`.
    """

    prompt: int
    rollout: int
    ids: list[int]
    turn_id: list[int]
    logprob: list[float]
    turn_terms: list[dict[str, float]]
    outcome_terms: dict[str, float]
    stops: list[str]
    finished: bool
    policy_version: int
    row_id: str
    failure: str = ""
    facts: dict[str, Any] = field(default_factory=dict)
    token_rewards: list[float] = field(default_factory=list)
    advantage: list[float] = field(default_factory=list)
    sampler: str = "own"
    scorer: str = "sampler"

    @property
    def turn_rewards(self) -> list[float]:
        """Reward of each turn."""
        return [sum(terms.values()) for terms in self.turn_terms]

    @property
    def outcome(self) -> float:
        """Reward of the whole."""
        return sum(self.outcome_terms.values())

    @property
    def sampled(self) -> int:
        """Number of tokens the policy sampled."""
        return sum(k != NOT_SAMPLED for k in self.turn_id)

    def token_row(self) -> TokenRow:
        """The rollout as a row to train on: every sampled token, and no other, has weight 1."""
        sampled = np.asarray(self.turn_id) != NOT_SAMPLED
        return TokenRow(
            ids=np.asarray(self.ids, dtype=np.int32),
            weight=sampled.astype(np.float32),
            segment=np.where(sampled, Segment.SOLUTION, Segment.PROMPT).astype(np.uint8),
            decile=np.full(len(self.ids), DECILE_NONE, dtype=np.int8),
            row_id=f"{self.row_id}/{self.rollout}",
        )


def write_ledger(path: Path, trajectories: Iterable[Trajectory]) -> None:
    """Append rollouts to a JSONL file, one line each.

    Args:
        path: the file; its folder exists.
        trajectories: what to write.
    """
    with path.open("a", encoding="utf-8") as file:
        for trajectory in trajectories:
            file.write(json.dumps(asdict(trajectory)) + "\n")


def read_ledger(path: Path) -> Iterator[Trajectory]:
    """Rollouts from a file that `write_ledger` wrote.

    Args:
        path: the file.

    Raises:
        UserError: a line is no rollout; the message names it.
    """
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                yield Trajectory(**json.loads(line))
            except (TypeError, ValueError) as error:
                raise UserError(f"{path}, line {number}: no rollout: {error}") from error
