"""The environment as the reward of token ids: what is left of a masked answer is said to it, and it says what it pays.

Shape letters: N copies, L tokens of prompt and answer.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lit_reason.envs.environment import Environment
from lit_reason.errors import UserError
from lit_reason.rewards.composition import Paid, Rewards
from lit_reason.rewards.dialogue import Dialogue, Turn
from lit_reason.rewards.sequence_reward import SequenceReward


class EnvironmentReward(SequenceReward):
    """Verifiers judge text: the tokens that are seen are decoded, after masking, and played in a fresh environment.

    Args:
        env: makes an environment.
        rewards: what is paid for what.
        decode: ids to text.
        stop_ids: tokens that end an answer, which are no text of it.
        task: row of the training data; given by `for_task`.
        start: where the answer begins.
    """

    def __init__(
        self,
        env: Callable[[], Environment],
        rewards: Rewards,
        decode: Callable[[Sequence[int]], str],
        stop_ids: Collection[int],
        task: Mapping[str, Any] | None = None,
        start: int = 0,
    ) -> None:
        self.env, self.rewards, self.decode, self.stop_ids = env, rewards, decode, frozenset(stop_ids)
        self.task, self.start = task, start
        self.version = f"environment {sorted((task or {}).items(), key=str)}"

    def for_task(self, task: Mapping[str, Any], start: int) -> EnvironmentReward:
        """The reward of answers to one task."""
        return EnvironmentReward(self.env, self.rewards, self.decode, self.stop_ids, task, start)

    def __call__(self, ids_NL: Tensor, seen_NL: Tensor) -> Tensor:
        """Play each copy."""
        return torch.tensor(
            [
                self._played([i for i, on in zip(ids[self.start :], seen[self.start :], strict=True) if on])
                for ids, seen in zip(ids_NL.tolist(), seen_NL.tolist(), strict=True)
            ],
            dtype=torch.float64,
        )

    def _played(self, ids: list[int]) -> float:
        assert self.task is not None, "ask for_task first"
        if ids and ids[-1] in self.stop_ids:
            ids = ids[:-1]
        env = self.env()
        try:
            env.reset(self.task, 0)
            text = self.decode(ids)
            step = env.step(text)
            if not (step.terminated or step.truncated):
                raise UserError(f"shaping explains answers of one turn, and {type(env).__name__} asks for another")
            turn = Turn(text, step.observation, step.info)
            terms = dict(step.info.get("terms", {"reward": step.reward}))
            paid = self.rewards.pay(Dialogue(self.task, (turn,), step.terminated), Paid([terms], env.outcome()))
            return sum(paid.turns[0].values()) + sum(paid.outcome.values())
        finally:
            env.close()
