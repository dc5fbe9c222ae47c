"""Dialogues as an environment's expert leads them, to warm a student up on before it learns by reward."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from lit_reason.envs.environment import Environment


def demonstrations(env: Environment, tasks: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Rows in messages format, one for each task that the expert gets through.

    Args:
        env: has an expert.
        tasks: rows of its training data.
    """
    return (row for task in tasks if (row := demonstration(env, task)))


def demonstration(env: Environment, task: Mapping[str, Any]) -> dict[str, Any] | None:
    """One dialogue, from the messages that open it to the expert's last turn.

    Args:
        env: has an expert.
        task: a row of its training data.

    Returns:
        The row, with the task's answer if it has one; None where a tool gave the expert nothing that is useful.
    """
    messages = [dict(message) for message in env.reset(task, 0)]
    for said in env.expert(task):
        step = env.step(said)
        if step.info.get("error") or (step.info.get("ran") and "useful" not in step.info["terms"]):
            return None
        messages.append({"role": "assistant", "content": said})
        if step.observation:
            messages.append({"role": "user", "content": step.observation})
    return {"messages": messages, **({"answer": task["answer"]} if "answer" in task else {})}
