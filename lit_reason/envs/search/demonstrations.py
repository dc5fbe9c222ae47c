"""Dialogues that answer questions of the fictional world as they should be answered, to warm up a student on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from lit_reason.envs.search.qa import SearchQA


def demonstrations(env: SearchQA) -> Iterator[dict[str, Any]]:
    """Rows in messages format, for all questions of a world; those whose passages are not found are left out.

    Args:
        env: speaks in tags; its limits are those of the dialogues.
    """
    for index in range(len(env.questions)):
        if row := demonstration(env, env.task(index, 0)):
            yield row


def demonstration(env: SearchQA, task: Mapping[str, Any]) -> dict[str, Any] | None:
    """One dialogue, searches and answer.

    Args:
        env: speaks in tags.
        task: one that it made up.

    Returns:
        The row, or None where a search does not bring its passage.
    """
    messages = [dict(message) for message in env.reset(task, 0)]
    for query in task["queries"]:
        said = f"<search> {query.format(o=task['bridge'])} </search>"
        step = env.step(said)
        if "useful" not in step.info["terms"]:
            return None
        messages += [{"role": "assistant", "content": said}, {"role": "user", "content": step.observation}]
    messages.append({"role": "assistant", "content": f"<answer> {task['answer']} </answer>"})
    return {"messages": messages, "answer": task["answer"]}
