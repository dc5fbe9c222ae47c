"""Rewards for dialogues with tools, those of arXiv 2505.11821 among them: plain functions of a dialogue.

They have size 1, so that a recipe's weights are the published numbers; docs/environments.md says which belong together.
Facts of turns are read as `ToolDialogue` reports them: `kind` (`tool`, `answer` or `neither`), `ran` (a call that gave
a result), `result`, and `answer`.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Sequence
from typing import Any

from lit_reason.rewards.dialogue import Dialogue, Turn

_TAG = re.compile(r"</?(\w+)>")
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_THOUGHTS = ("reasoning", "think")
_ACTIONS = ("tool", "search", "answer")


def executed(dialogue: Dialogue) -> list[float]:
    """Calls that ran, as a share of the calls that were tried: the turns of a dialogue sum to at most 1.

    Args:
        dialogue: the dialogue.
    """
    tried = sum(_fact(t, "kind") == "tool" for t in dialogue.turns)
    return [float(_fact(t, "ran")) / tried if tried else 0.0 for t in dialogue.turns]


def first_result_has_answer(dialogue: Dialogue) -> list[float]:
    """1 for the turn of the first result, if an accepted answer stands in it (the paper's first version).

    Args:
        dialogue: the dialogue.
    """
    first = next((k for k, t in enumerate(dialogue.turns) if _fact(t, "ran")), None)
    return [float(k == first and _holds_answer(t, dialogue)) for k, t in enumerate(dialogue.turns)]


def result_has_answer(dialogue: Dialogue) -> list[float]:
    """1 for every turn in whose result an accepted answer stands (the paper's second version).

    Args:
        dialogue: the dialogue.
    """
    return [float(bool(_fact(t, "ran")) and _holds_answer(t, dialogue)) for t in dialogue.turns]


def turn_format(dialogue: Dialogue) -> list[float]:
    """1 for a well-formed turn that calls a tool, -2 for a malformed one, 0 for an answer.

    Args:
        dialogue: the dialogue.
    """
    worth = {"tool": 1.0, "neither": -2.0, "answer": 0.0}
    return [worth[_fact(t, "kind")] for t in dialogue.turns]


def calls_so_far(dialogue: Dialogue) -> list[float]:
    """For each turn that calls a tool the number of calls up to it; a negative weight makes further calls dearer.

    Args:
        dialogue: the dialogue.
    """
    found, calls = [], 0
    for turn in dialogue.turns:
        called = _fact(turn, "kind") == "tool"
        calls += called
        found.append(float(calls) if called else 0.0)
    return found


def answer_present(dialogue: Dialogue) -> float:
    """1 if an accepted answer stands anywhere in what was answered.

    Args:
        dialogue: the dialogue.
    """
    said = _answer(dialogue)
    return float(said is not None and any(a.lower() in said.lower() for a in accepted(dialogue.task)))


def exact_match(dialogue: Dialogue) -> float:
    """1 if the answer is an accepted one but for case, punctuation, articles and blanks, as question answering counts.

    Args:
        dialogue: the dialogue.
    """
    said = _answer(dialogue)
    return float(said is not None and plain(said) in {plain(a) for a in accepted(dialogue.task)})


def exact_match_strict(dialogue: Dialogue) -> float:
    """1 if the answer is an accepted one but for case and outer blanks (the paper's released code).

    Args:
        dialogue: the dialogue.
    """
    said = _answer(dialogue)
    return float(said is not None and said.strip().lower() in {a.strip().lower() for a in accepted(dialogue.task)})


def graded_answer(dialogue: Dialogue) -> float:
    """1 for a right answer in a well-formed dialogue, 0.2 for a well-formed one, -1 for a malformed one.

    Args:
        dialogue: the dialogue.
    """
    if _answer(dialogue) is None or any(_fact(t, "kind") == "neither" for t in dialogue.turns):
        return -1.0
    return 1.0 if exact_match(dialogue) else 0.2


def message_format(dialogue: Dialogue) -> float:
    """How far the turns keep to `<reasoning>...</reasoning>` followed by one tool call or answer; mean over turns.

    Of each turn: 0.4 for the share of the two fields it has, 0.2 if the text in them is kept apart from the tags, 0.2
    if it begins with the thoughts, 0.2 if it ends with the action.

    Args:
        dialogue: the dialogue.
    """
    return _mean([_format(t.text) for t in dialogue.turns])


def tag_counts(dialogue: Dialogue) -> float:
    """Share of the tags of a turn that are there exactly once: both of the thoughts and both of the action; mean.

    Args:
        dialogue: the dialogue.
    """
    return _mean([_tags(t.text) for t in dialogue.turns])


TOOL_USE: dict[str, Callable[[Dialogue], float | Sequence[float]]] = {
    reward.__name__: reward  # type: ignore[attr-defined]
    for reward in (
        *(executed, first_result_has_answer, result_has_answer, turn_format, calls_so_far),
        *(answer_present, exact_match, exact_match_strict, graded_answer, message_format, tag_counts),
    )
}


def accepted(task: Any) -> list[str]:
    """The answers that a task accepts: its `answers`, or its one `answer`.

    Args:
        task: a row of the data.

    Raises:
        ValueError: it has neither.
    """
    found = task.get("answers") or ([task["answer"]] if task.get("answer") is not None else [])
    if isinstance(found, str) or not found:
        raise ValueError("the task has neither 'answer' nor a list 'answers'")
    return [str(answer) for answer in found]


def plain(text: str) -> str:
    """Text as answers are compared: lower case, no punctuation, no articles, single blanks (arXiv 1606.05250).

    Args:
        text: an answer.
    """
    kept = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(_ARTICLES.sub(" ", kept).split())


def _fact(turn: Turn, name: str) -> Any:
    if name not in turn.info:
        raise ValueError(f"the environment reports no '{name}' of a turn, which dialogues with tools do")
    return turn.info[name]


def _holds_answer(turn: Turn, dialogue: Dialogue) -> bool:
    result = str(_fact(turn, "result")).lower()
    return any(answer.lower() in result for answer in accepted(dialogue.task))


def _answer(dialogue: Dialogue) -> str | None:
    return _fact(dialogue.turns[-1], "answer")


def _field(text: str, names: Sequence[str]) -> re.Match[str] | None:
    return re.search(rf"<({'|'.join(names)})>(.*?)</\1>", text, re.DOTALL)


def _format(text: str) -> float:
    fields = [found for names in (_THOUGHTS, _ACTIONS) if (found := _field(text, names))]
    apart = bool(fields) and all(f[2].strip() and f[2] != f[2].strip() for f in fields)
    begins = bool(re.match(rf"\s*<({'|'.join(_THOUGHTS)})>", text))
    ends = bool(re.search(rf"</({'|'.join(_ACTIONS)})>\s*$", text))
    return 0.4 * len(fields) / 2 + 0.2 * apart + 0.2 * begins + 0.2 * ends


def _tags(text: str) -> float:
    found = _TAG.findall(text)
    thoughts = next((n for n in _THOUGHTS if n in found), _THOUGHTS[0])
    action = next((n for n in _ACTIONS if n in found), _ACTIONS[0])
    wanted = [f"<{n}>" for n in (thoughts, action)] + [f"</{n}>" for n in (thoughts, action)]
    return sum(text.count(tag) == 1 for tag in wanted) / 4


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
