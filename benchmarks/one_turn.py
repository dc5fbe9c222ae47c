"""The task of `benchmarks.grpo_steps` as an environment: one answer, and a reward that is a function of its text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.grpo_steps import question, reward
from lit_reason.envs.environment import Environment, Message, Step


class OneTurn(Environment):
    """Asks, takes the answer, and is over."""

    def task(self, index: int, seed: int) -> dict[str, Any]:
        """A question of its own for each number."""
        return {"question": question(index)}

    def reset(self, task: Mapping[str, Any], seed: int, rollout: int = 0) -> list[Message]:
        """Ask."""
        return [{"role": "user", "content": task["question"]}]

    def step(self, action: str) -> Step:
        """Take the answer."""
        return Step("", reward(action), True, False, {})

    def outcome(self) -> dict[str, float]:
        """All is paid for the turn."""
        return {}
