"""A turn and its trace: finding it in the text, taking a part of it that keeps the answer, putting it
back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from lit_reason.data.condensation.answers import answer_start, answers_match
from lit_reason.data.condensation.markers import TraceText, split_trace
from lit_reason.data.conversation import Message, Trace


def find_trace(message: Message) -> TraceText | None:
    """Where the trace of a turn stands: in the reasoning field, else between think markers in the content.

    In a plain text only a trace with both markers counts, since what precedes a lone closing marker would be
    the prompt as well.

    Args:
        message: any turn.

    Returns:
        The parts, None without a trace. `open_only` marks a trace that was cut before its end.
    """
    if message.reasoning is not None and message.reasoning.strip():
        return TraceText("", "", message.reasoning, "", message.content, "field")
    parts = split_trace(message.content)
    return None if parts and message.role == "text" and parts.case != "both" else parts


def whole_trace(content: str) -> TraceText:
    """A text without markers, read as a trace that runs up to the sentence stating the final answer.

    Args:
        content: a worked solution.

    Returns:
        Body and rest; the rest is empty where no answer is stated.
    """
    cut = answer_start(content)
    cut = len(content) if cut is None else cut
    return TraceText("", "", content[:cut], "", content[cut:], "whole")


def locate_trace(message: Message) -> TraceText | None:
    """Where `message.trace` stands in its turn now.

    Args:
        message: a turn that condensation has looked at.

    Returns:
        Parts whose body is `message.trace.text`; None without a trace, or when the text does not hold it.
    """
    if message.trace is None:
        return None
    body = message.trace.text
    parts = find_trace(message)
    if parts and parts.body == body:
        return parts
    if message.content.startswith(body):
        return TraceText("", "", body, "", message.content[len(body) :], "whole")
    return None


def place_trace(message: Message, parts: TraceText, trace: Trace) -> Message:
    """The turn with another trace in the place of its own.

    Args:
        message: the turn.
        parts: where its trace stands.
        trace: the new one.
    """
    if parts.case == "field":
        return replace(message, reasoning=trace.text, trace=trace)
    content = parts.prefix + parts.opening + trace.text + parts.closing + parts.rest
    return replace(message, content=content, trace=trace)


def without_trace(message: Message) -> Message:
    """The turn without its thinking: no reasoning field, no markers, nothing between them.

    Args:
        message: an earlier assistant turn.
    """
    parts = split_trace(message.content)
    content = message.content if parts is None else parts.prefix + parts.rest.lstrip()
    return replace(message, content=content, reasoning=None, trace=None)


def subtrace(trace: Trace, positions: Sequence[int], bridge: str = "") -> Trace:
    """Some thoughts of a trace.

    The white space at the very beginning and end of the trace stays, whichever thoughts do: generation
    prompts and chat templates put line breaks beside the markers.

    Args:
        trace: the trace.
        positions: indices into `trace.thoughts`, ascending, at least one.
        bridge: text put before a thought whose predecessor is left out.
    """
    thoughts = [trace.thoughts[p] for p in positions]
    for at in range(1, len(positions)):
        if bridge and positions[at] != positions[at - 1] + 1:
            thoughts[at] = bridge + thoughts[at]
    first, last = trace.thoughts[0], trace.thoughts[-1]
    if positions[0] != 0:
        thoughts[0] = first[: len(first) - len(first.lstrip())] + thoughts[0]
    if positions[-1] != len(trace.thoughts) - 1:
        thoughts[-1] = (thoughts[-1].rstrip() + last[len(last.rstrip()) :]) or thoughts[-1]
    return Trace(tuple(thoughts), tuple(trace.origin[p] for p in positions), trace.total)


class RowDropped(Exception):
    """The row is to be left out, for the reason given."""


@dataclass(frozen=True)
class TurnPlan:
    """One trained turn with its trace cut into thoughts.

    Attributes:
        parts: where the trace stands in the turn.
        trace: the trace to shorten.
        answer: what the trace must still yield afterwards, or None.
        read_answer: how an answer is read from a text.
        protect: thoughts at the end that always stay.
        sizes: tokens of each thought; empty when only a length is to be met.
    """

    parts: TraceText
    trace: Trace
    answer: str | None
    read_answer: Callable[[str], str | None]
    protect: int
    sizes: tuple[int, ...] = ()

    def yields_answer(self, trace: Trace) -> bool:
        """Whether the turn with this trace still gives the answer.

        Args:
            trace: a shorter trace.
        """
        found = self.read_answer(f"{trace.text}\n{self.parts.rest}")
        return found is not None and answers_match(found, self.answer or "")

    def keep_answer(
        self, make: Callable[[int], Trace], rule: str, counts: Counter[str], *, can_grow: bool = True
    ) -> Trace | None:
        """Shorten the trace under the rule `on_answer_lost`.

        Args:
            make: the shorter trace with at least this many thoughts of the end, complete.
            rule: `extend_tail` takes the shortest end that gives the answer back, `keep_full` or `drop`.
            counts: takes the outcome.
            can_grow: whether `make` heeds its argument; without, `extend_tail` is `keep_full`.

        Returns:
            A trace that yields the answer, or None to leave the turn as it is.

        Raises:
            RowDropped: the answer is lost and the rule is `drop`.
        """
        trace = make(0)
        if self.answer is None:
            counts["kept by the solution, or none stated"] += 1
            return trace
        counts["in the trace alone"] += 1
        if self.yields_answer(trace):
            return trace
        counts["lost"] += 1
        if rule == "drop":
            counts["lost, row dropped"] += 1
            raise RowDropped("final answer lost")
        if rule == "keep_full" or not can_grow:
            counts["lost, trace left whole"] += 1
            return None
        counts["lost, repaired by a longer end"] += 1
        total = len(self.trace.thoughts)
        low, high = 0, 1
        while high < total and not self.yields_answer(make(high)):
            low, high = high, min(2 * high, total)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self.yields_answer(make(middle)) else (middle, high)
        return make(high)
