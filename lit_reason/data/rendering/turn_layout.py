"""Where thoughts, markers, solution and tool calls stand in the text of a rendered assistant turn.

Nothing here searches for token sequences: how a marker is tokenised depends on its neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from lit_reason.data.condensation.markers import MARKERS, MarkerPair, TraceText
from lit_reason.data.condensation.thoughts import stage
from lit_reason.data.conversation import Message
from lit_reason.data.rendering.chat_template import TemplateMismatch, answer_inside, opening_of, reasoning_parts
from lit_reason.data.rendering.template_traits import opened_marker
from lit_reason.data.token_row import DECILE_NONE, Segment
from lit_reason.errors import RowError

VERBATIM = "set render.turn_text=verbatim to write the assistant's text as it is"


class Piece(NamedTuple):
    """A stretch of text that lasts until the next piece begins.

    Attributes:
        start: its first character.
        segment: what it is part of.
        decile: decile of its thought in the full trace, -1 outside thoughts.
    """

    start: int
    segment: Segment
    decile: int = DECILE_NONE


@dataclass(frozen=True)
class TurnLayout:
    """The pieces of one assistant turn, in characters from the start of its span.

    Attributes:
        pieces: in order; the first starts at 0 unless the turn is empty.
        seams: first characters of the thoughts before which something was cut out.
        body_end: character after the last thought.
    """

    pieces: tuple[Piece, ...]
    seams: tuple[int, ...]
    body_end: int


def lay_out(message: Message, span: str, prompt: str, pair: MarkerPair) -> TurnLayout:
    """Find the parts of an assistant turn in its rendered text.

    Args:
        message: the turn.
        span: its text from the generation prompt to just before the end token.
        prompt: the rendered prompt before it (its end says whether the think block is open).
        pair: the model's think markers.

    Returns:
        The layout.

    Raises:
        TemplateMismatch: the template dropped, doubled or rewrote thoughts, answer or tool calls.
    """
    parts = _parts(message, pair)
    opened = opened_marker(prompt)
    pieces: list[Piece] = []
    cursor = 0
    prefix, body, solution = parts.prefix.strip(), parts.body.strip(), parts.rest.strip()
    if prefix:
        cursor = _find(span, prefix, 0, "text before the thoughts")
        pieces.append(Piece(0, Segment.SOLUTION))
        cursor += len(prefix)
    seams: tuple[int, ...] = ()
    if body:
        begin = _body_start(span, body, cursor, parts, pair)
        _refuse_doubled(span[cursor:begin], parts, opened)
        pieces.append(Piece(cursor, Segment.MARKER))
        thoughts, seams = _thoughts(message, parts.body, begin, begin + len(body))
        pieces += thoughts
        cursor = begin + len(body)
    body_end = cursor
    _refuse_open(message, span[cursor:], parts, opened)
    if solution:
        begin = _solution_start(message, span, solution, cursor, parts)
        after = begin + len(solution)
        while begin > cursor and span[begin - 1] == " ":
            begin -= 1  # the blank before a word is part of the word's token
        gap = span[cursor:begin]
        if not body:
            _refuse_doubled(gap, parts, opened)
        pieces.append(Piece(cursor, Segment.MARKER if gap.strip() else Segment.SOLUTION))
        pieces.append(Piece(begin, Segment.SOLUTION))
        cursor = after
    if message.tool_calls:
        cursor = _calls_start(message, span, cursor, parts, pieces)
        pieces.append(Piece(cursor, Segment.TOOL_CALL))
    elif not solution:
        pieces.append(Piece(cursor, Segment.MARKER if span[cursor:].strip() else Segment.SOLUTION))
    return TurnLayout(tuple(pieces), seams, body_end)


def _parts(message: Message, pair: MarkerPair) -> TraceText:
    """The five parts of the turn; a trace without markers (`on_missing: whole`) is found in the content."""
    parts = reasoning_parts(message, pair.opening, pair.closing)
    trace = message.trace
    if parts is None and trace is not None and trace.text.strip():
        before, found, after = message.content.partition(trace.text)
        if not found:
            raise RowError("the turn's trace is not part of its content")
        return TraceText(before, "", trace.text, "", after, "whole")
    return parts or TraceText("", "", "", "", message.content, "whole")


def _find(span: str, text: str, start: int, what: str) -> int:
    at = span.find(text, start)
    if at < 0:
        raise TemplateMismatch(
            f"the chat template does not write the {what} of a turn: {_short(text)!r} is not in "
            f"{_short(span)!r}; {VERBATIM}"
        )
    return at


def _body_start(span: str, body: str, cursor: int, parts: TraceText, pair: MarkerPair) -> int:
    """First character of the thoughts: after their opening marker where one is written in the span."""
    own = parts.opening or (opening_of(parts.closing) if parts.closing else "")
    for opening in (own, pair.opening):
        at = span.find(opening, cursor) if opening else -1
        if at >= 0:
            begin = at + len(opening)
            begin += len(span[begin:]) - len(span[begin:].lstrip())
            if span.startswith(body, begin):
                return begin
    return _find(span, body, cursor, "thoughts")


def _thoughts(message: Message, body: str, begin: int, end: int) -> tuple[list[Piece], tuple[int, ...]]:
    """One piece a thought; a trace that nobody segmented counts as one thought."""
    trace = message.trace
    if trace is None:
        return [Piece(begin, stage(0, 1), 0)], ()
    if trace.text.strip() != body.strip():
        raise RowError("the turn's trace is not the text between its think markers")
    at = begin - (len(trace.text) - len(trace.text.lstrip()))
    starts = []
    for thought in trace.thoughts:
        starts.append(min(max(at, begin), end))
        at += len(thought)
    pieces = [
        Piece(start, stage(origin, trace.total), origin * 10 // trace.total)
        for start, origin in zip(starts, trace.origin, strict=True)
    ]
    return pieces, tuple(starts[j] for j in trace.seams)


def _solution_start(message: Message, span: str, solution: str, cursor: int, parts: TraceText) -> int:
    """First character of the solution: it ends the turn, or stands before the tool calls."""
    if message.tool_calls:
        close = span.find(parts.closing, cursor) if parts.closing else -1
        return _find(span, solution, max(cursor, close + len(parts.closing)), "text beside the tool call")
    begin = len(span.rstrip()) - len(solution)
    if begin < cursor or not span.startswith(solution, begin):
        raise TemplateMismatch(
            "the chat template drops or rewrites the end of a turn: it ends "
            f"{_short(span[cursor:])!r} instead of {_short(solution)!r}; {VERBATIM}"
        )
    return begin


def _calls_start(message: Message, span: str, cursor: int, parts: TraceText, pieces: list[Piece]) -> int:
    """First character of the tool calls; a closing marker before them is marked on the way."""
    for call in message.tool_calls:
        name = str(call.get("function", {}).get("name", ""))
        if name not in span[cursor:]:
            raise TemplateMismatch(
                f"the chat template does not write tool calls: {name!r} is not in {_short(span)!r}; "
                "give one that does with lm.chat_template"
            )
    head = span[cursor : span.index(str(message.tool_calls[0]["function"]["name"]), cursor)]
    closed = max((head.rfind(p.closing) + len(p.closing) for p in MARKERS if p.closing in head), default=0)
    if closed and not parts.rest.strip():
        pieces.append(Piece(cursor, Segment.MARKER))
        return cursor + closed + len(head[closed:]) - len(head[closed:].lstrip())
    return cursor


def _refuse_doubled(gap: str, parts: TraceText, opened: MarkerPair | None) -> None:
    """The text before thoughts or answer may open the block once, and not at all when the prompt did."""
    count = sum(gap.count(pair.opening) for pair in MARKERS) + (opened is not None)
    if count > 1:
        raise TemplateMismatch(
            f"the chat template doubles the think block: it is opened {count} times before "
            f"{_short(parts.body or parts.rest)!r}; {VERBATIM}"
        )


def _refuse_open(message: Message, rest: str, parts: TraceText, opened: MarkerPair | None) -> None:
    """A block that the prompt opened must be closed, unless the trace itself was cut off."""
    if opened is None or message.truncated or parts.case == "open_only":
        return
    if not any(pair.closing in rest for pair in MARKERS):
        raise answer_inside(opened.opening)


def _short(text: str, limit: int = 60) -> str:
    return text if len(text) <= limit else f"{text[: limit // 2]} ... {text[-limit // 2 :]}"
