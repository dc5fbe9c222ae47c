"""Arithmetic in steps, with a calculator that does one operation a call, or with Python."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from lit_reason.envs.environment import Message
from lit_reason.envs.python_tool import python_tool
from lit_reason.envs.tool_dialogue import Action, ToolDialogue, ToolRewards, written_call
from lit_reason.errors import UserError
from lit_reason.rewards.checkers import get_checker

Operator = Literal["+", "-", "*"]
_DO = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}


def calculate(a: int, operator: Operator, b: int) -> int:
    """One arithmetic operation on two whole numbers.

    Args:
        a: the first number.
        operator: what to do with them.
        b: the second number.
    """
    return _DO[operator](a, b)


def make_task(index: int, seed: int, *, operations: int = 3, largest: int = 20) -> dict[str, Any]:
    """A chain such as `((3 + 5) * 2) - 4`, with its intermediate results.

    Args:
        index: number of the task; equal (index, seed) give equal tasks.
        seed: of the whole set.
        operations: operations in the chain.
        largest: numbers are drawn from 1 to this; multipliers from 2 to 5, so that results stay readable.

    Returns:
        `question`, `answer`, and in order the operations as `calls` (number, operator, number) and their results as
        `steps`.
    """
    rng = random.Random(f"{seed} {index}")
    value = rng.randint(1, largest)
    text, calls, steps = str(value), [], []
    for k in range(operations):
        operator = rng.choice("+-*")
        operand = rng.randint(2, 5) if operator == "*" else rng.randint(1, largest)
        calls.append([value, operator, operand])
        value = _DO[operator](value, operand)
        text = f"{text} {operator} {operand}" if k == 0 else f"({text}) {operator} {operand}"
        steps.append(value)
    return {"question": f"What is {text}?", "answer": str(value), "calls": calls, "steps": steps}


class Arithmetic(ToolDialogue):
    """Tasks of `make_task`: a turn is useful when its result is the next step of the chain.

    Args:
        operations: operations of a task that is made up.
        largest: largest number in one.
        tool: `calculator` does one operation a call; `python` runs programs in a sandbox.
        as_root: run the sandbox although this process is root.
        rewards: what is paid for what.
        max_calls: a further call is refused as an error.
    """

    def __init__(
        self,
        operations: int = 3,
        largest: int = 20,
        tool: Literal["calculator", "python"] = "calculator",
        as_root: bool = False,
        rewards: ToolRewards | None = None,
        max_calls: int = 8,
    ) -> None:
        super().__init__([calculate if tool == "calculator" else python_tool(as_root)], rewards, max_calls)
        self.operations, self.largest = operations, largest

    def task(self, index: int, seed: int) -> dict[str, Any]:
        """A chain of operations."""
        return make_task(index, seed, operations=self.operations, largest=self.largest)

    def reset(self, task: Mapping[str, Any], seed: int, rollout: int = 0) -> list[Message]:
        """Ask the question."""
        self.begin()
        self.truth, self.left = str(task["answer"]), [str(step) for step in task["steps"]]
        return [self.instructions(), {"role": "user", "content": task["question"]}]

    def expert(self, task: Mapping[str, Any]) -> Iterator[str]:
        """One call for each operation of the chain, then the answer.

        Raises:
            UserError: the task is from a file that does not name the operations.
        """
        if "calls" not in task:
            raise UserError("a task of Arithmetic needs a field 'calls' (number, operator, number) for its expert")
        for a, operator, b in task["calls"]:
            if "calculate" in self.tools:
                yield written_call("calculate", a=a, operator=operator, b=b)
            else:
                yield written_call("python", source=f"print({a} {operator} {b})")
        yield f"<answer>{task['answer']}</answer>"

    def useful(self, action: Action, result: str) -> bool:
        """Whether the result ends in the next step of the chain; each step counts once."""
        said = result.split()
        if self.left and said and said[-1] == self.left[0]:
            self.left.pop(0)
            return True
        return False

    def correct(self, answer: str) -> bool:
        """Whether the answer's number is the chain's result."""
        return get_checker("numeric")(answer, self.truth).correct
