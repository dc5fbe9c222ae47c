"""A dialogue in which the model calls tools and then answers (the setting of arXiv 2505.11821, case study 1).

A turn ends in `<tool>{"name": ..., "args": {...}}</tool>` or `<answer>...</answer>`. Results come back as a user's
message, `<result>...</result>`; errors as plain text that begins with "Error:".
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from lit_reason.envs.environment import Environment, Message, Step
from lit_reason.envs.tools import Tool, ToolError, call_tool

_PART = re.compile(r"<(tool|answer)>(.*?)</\1>", re.DOTALL)


@dataclass(frozen=True)
class Action:
    """What a turn of the model says.

    Attributes:
        kind: `tool` a call, `answer` an answer, `neither` (`text` then says what is wrong).
        text: the answer, or what is wrong.
        name: of the tool.
        arguments: of the call, as the model wrote them.
    """

    kind: Literal["tool", "answer", "neither"]
    text: str = ""
    name: Any = None
    arguments: Any = None


def parse_action(text: str) -> Action:
    """Read a turn. Exactly one call or answer makes an action.

    Args:
        text: the turn.

    Returns:
        The action; its `kind` is `neither` where there is none or more than one, or a call is no JSON object.
    """
    parts = _PART.findall(text)
    if len(parts) != 1:
        found = "no" if not parts else str(len(parts))
        return Action("neither", f"a turn has one <tool> or one <answer>; this one has {found}")
    kind, body = parts[0]
    if kind == "answer":
        return Action("answer", body.strip())
    try:
        call = json.loads(body)
    except (json.JSONDecodeError, RecursionError) as error:
        return Action("neither", f"the tool call is no JSON: {error}")
    if not isinstance(call, dict) or "name" not in call:
        return Action("neither", 'a tool call is an object {"name": ..., "args": {...}}')
    return Action("tool", name=call["name"], arguments=call.get("args", {}))


def written_call(name: str, **arguments: Any) -> str:
    """A tool call as a model should write it.

    Args:
        name: of the tool.
        arguments: of the call.
    """
    return f"<tool>{json.dumps({'name': name, 'args': arguments})}</tool>"


@dataclass(frozen=True)
class ToolRewards:
    """What is paid for what.

    Args:
        executed: to a turn whose tool call ran.
        useful: to a turn whose tool result the task counts as progress.
        malformed: to a turn that is neither a call nor an answer.
        answered: to a dialogue that ended in an answer.
        correct: to a dialogue that ended in the right answer.
    """

    executed: float = 0.2
    useful: float = 0.5
    malformed: float = 0.0
    answered: float = 0.2
    correct: float = 1.0


class ToolDialogue(Environment):
    """A question, some tools, an answer.

    A subclass gives the opening messages (`reset`, which must call `begin`), and says what is useful and what correct.

    Args:
        functions: the tools, as functions.
        rewards: what is paid for what.
        max_calls: a further call is refused as an error.
    """

    stops = ("</tool>", "</answer>")

    def __init__(
        self, functions: list[Callable[..., Any]], rewards: ToolRewards | None = None, max_calls: int = 8
    ) -> None:
        self.tools: dict[str, Tool] = {t.name: t for t in map(Tool.of, functions)}
        self.rewards = rewards or ToolRewards()
        self.max_calls = max_calls
        self.begin()

    def begin(self) -> None:
        """Forget the last dialogue."""
        self.calls = 0
        self.answer: str | None = None

    def instructions(self) -> Message:
        """The system message: how to call tools, and which there are."""
        lines = [
            "Solve the task. You may call one tool a turn:",
            '<tool>{"name": "...", "args": {...}}</tool>',
            "and read its result in <result></result>. When you know the answer, write <answer>...</answer>.",
            "Tools:",
            *(f"- {tool.signature()}" for tool in self.tools.values()),
        ]
        return {"role": "system", "content": "\n".join(lines)}

    def useful(self, action: Action, result: str) -> bool:
        """Whether a tool's result is progress on the task.

        Args:
            action: the call.
            result: what it gave.
        """
        return False

    def correct(self, answer: str) -> bool:
        """Whether an answer is right.

        Args:
            answer: what the model answered.
        """
        raise NotImplementedError

    def parse(self, text: str) -> Action:
        """Read a turn; a dialogue with tags of its own reads them here.

        Args:
            text: the turn.
        """
        return parse_action(text)

    def shown(self, result: str) -> str:
        """A tool's result as the model reads it.

        Args:
            result: what the tool gave.
        """
        return f"<result>{result}</result>"

    def step(self, action: str) -> Step:
        """Run the call, or take the answer."""
        said, pay = self.parse(action), self.rewards
        if said.kind == "answer":
            self.answer = said.text
            return _step(said, "", {}, terminated=True, answer=said.text)
        if said.kind == "neither":
            return _step(said, f"Error: {said.text}", {"malformed": pay.malformed}, error=said.text)
        if self.calls >= self.max_calls:
            return _step(said, f"Error: no more than {self.max_calls} calls; answer now", {}, error="too many calls")
        self.calls += 1
        try:
            result = call_tool(self.tools, said.name, said.arguments)
        except ToolError as error:
            return _step(said, f"Error: {error}", {}, error=str(error))
        terms = {"executed": pay.executed}
        if self.useful(said, result):
            terms["useful"] = pay.useful
        return _step(said, self.shown(result), terms, ran=True, result=result)

    def outcome(self) -> dict[str, float]:
        """Rewards for having answered, and for being right."""
        if self.answer is None:
            return {"answered": 0.0, "correct": 0.0}
        return {
            "answered": self.rewards.answered,
            "correct": self.rewards.correct if self.correct(self.answer) else 0.0,
        }


def _step(
    said: Action, observation: str, terms: Mapping[str, float], *, terminated: bool = False, **facts: Any
) -> Step:
    """A step whose `info` holds the facts that rewards of dialogues with tools read."""
    info = {"terms": dict(terms), "kind": said.kind, "ran": False, "result": "", "answer": None, "error": "", **facts}
    return Step(observation, sum(terms.values()), terminated, False, info)
