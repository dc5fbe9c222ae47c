"""Tasks of the reasoning-gym package (extra `reasoning-gym`), with a calculator or Python beside them."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from typing import Any, Literal

from lit_reason.envs.arithmetic import calculate
from lit_reason.envs.environment import Message
from lit_reason.envs.python_tool import python_tool
from lit_reason.envs.tool_dialogue import ToolDialogue, ToolRewards
from lit_reason.errors import UserError, did_you_mean

# Their answers are open: the stored one is an example that their own scorer does not give full marks.
OPEN_ENDED = ("boxnet", "graph_color", "propositional_logic", "rubiks_cube", "rush_hour")
BLOCK = 500  # items of one seed
WITHOUT_ITEMS = ("composite",)  # a mixture that needs members


class ReasoningGym(ToolDialogue):
    """One generated task of reasoning-gym; the answer is scored by the task's own scorer.

    Five tasks are left out (`OPEN_ENDED`): the answer stored with an item does not score 1 there, so nothing could be
    checked against it.

    Args:
        name: name of the task, such as `leg_counting`.
        settings: of the task, as its own config names them.
        tool: `none`, the `calculator`, or `python` in a sandbox.
        as_root: run the sandbox although this process is root.
        rewards: what is paid for what; `correct` is paid by the share that the scorer gives.
        max_calls: a further call is refused as an error.

    Raises:
        UserError: there is no such task or setting, it is left out, or the package is not installed.
    """

    def __init__(
        self,
        name: str,
        settings: dict[str, Any] | None = None,
        tool: Literal["none", "calculator", "python"] = "calculator",
        as_root: bool = False,
        rewards: ToolRewards | None = None,
        max_calls: int = 8,
    ) -> None:
        tools = {"none": [], "calculator": [calculate]}
        super().__init__(tools[tool] if tool in tools else [python_tool(as_root)], rewards, max_calls)
        self.name, self.settings = name, json.dumps(settings or {}, sort_keys=True)
        self._scorer = dataset(name, self.settings, 0)  # made now: a wrong name or setting is known before training

    def task(self, index: int, seed: int) -> dict[str, Any]:
        """Item `index` of the task's items of that seed, which come in blocks with seeds of their own."""
        block, place = divmod(index, BLOCK)
        item = dataset(self.name, self.settings, seed * 1_000_003 + block)[place]
        return {"question": item["question"], "answer": item["answer"], "metadata": item["metadata"]}

    def reset(self, task: Mapping[str, Any], seed: int, rollout: int = 0) -> list[Message]:
        """Ask the question."""
        self.begin()
        self.item = dict(task)
        return [self.instructions(), {"role": "user", "content": task["question"]}]

    def correct(self, answer: str) -> bool:
        """Whether the task's scorer gives the answer full marks."""
        return self._score(answer) == 1.0

    def outcome(self) -> dict[str, float]:
        """Rewards for having answered, and for as much of the answer as the scorer finds right."""
        if self.answer is None:
            return {"answered": 0.0, "correct": 0.0}
        return {"answered": self.rewards.answered, "correct": self.rewards.correct * self._score(self.answer)}

    def _score(self, answer: str) -> float:
        return float(self._scorer.score_answer(answer=answer, entry=self.item))


@functools.lru_cache(maxsize=16)
def dataset(name: str, settings: str, seed: int) -> Any:
    """A block of items of one task.

    Args:
        name: of the task.
        settings: of the task, as JSON.
        seed: of the block.

    Raises:
        UserError: there is no such task or setting, it is left out, or the package is not installed.
    """
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise UserError("ReasoningGym needs its package: pip install 'lit-reason[reasoning-gym]'") from error
    usable = sorted(set(DATASETS) - {*OPEN_ENDED, *WITHOUT_ITEMS})
    if name in OPEN_ENDED:
        raise UserError(f"ReasoningGym: '{name}' is left out: the answer stored with an item is only an example there")
    if name not in usable:
        raise UserError(f"ReasoningGym: there is no task '{name}'{did_you_mean(name, usable)}")
    known, given = DATASETS[name][1].__dataclass_fields__, json.loads(settings)
    for setting in given:
        if setting not in known or setting in ("size", "seed"):
            allowed = [k for k in known if k not in ("size", "seed")]
            near = did_you_mean(setting, allowed)
            raise UserError(
                f"ReasoningGym: task '{name}' has no setting '{setting}'{near}; it has {', '.join(allowed)}"
            )
    try:
        return reasoning_gym.create_dataset(name, **{**given, "size": BLOCK, "seed": seed})
    except (TypeError, AssertionError, ValueError) as error:
        raise UserError(f"ReasoningGym: task '{name}' with {given}: {error}") from error
