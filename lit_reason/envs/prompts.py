"""A prompt and one answer to it, which somebody else rewards: a reward model, or a shaped reward."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

from lit_reason.envs.environment import Environment, Message, Step
from lit_reason.errors import UserError


class Prompts(Environment):
    """One turn, without a reward of its own. A task has a `prompt`, or the `messages` before the answer.

    Args:
        words: from which prompts are made up where no file gives them.
        length: words of a made-up prompt.
    """

    def __init__(self, words: Sequence[str] = (), length: int = 2) -> None:
        self.words, self.length = tuple(words), length

    def task(self, index: int, seed: int) -> dict[str, Any]:
        """A few words drawn by number and seed."""
        if not self.words:
            return super().task(index, seed)
        rng = random.Random(f"{seed} {index}")
        return {"prompt": "".join(rng.choice(self.words) for _ in range(self.length))}

    def check(self, task: Mapping[str, Any]) -> None:
        """Refuse a task that shows nothing."""
        self.reset(task, 0)

    def reset(self, task: Mapping[str, Any], seed: int, rollout: int = 0) -> list[Message]:
        """Show the prompt.

        Raises:
            UserError: the task has none.
        """
        if isinstance(task.get("messages"), list) and task["messages"]:
            messages = [{"role": str(m["role"]), "content": str(m["content"])} for m in task["messages"]]
            while messages and messages[-1]["role"] == "assistant":  # the answer is the policy's to give
                messages.pop()
            if messages:
                return messages
        if not isinstance(task.get("prompt"), str) or not task["prompt"]:
            raise UserError(f"a task of Prompts needs a field 'prompt' or 'messages'; it has {', '.join(task)}")
        return [{"role": "user", "content": task["prompt"]}]

    def step(self, action: str) -> Step:
        """The answer ends the dialogue."""
        return Step("", 0.0, True, False, {"terms": {}})

    def outcome(self) -> dict[str, float]:
        """Nothing."""
        return {}
