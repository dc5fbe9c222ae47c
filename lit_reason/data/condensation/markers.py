"""Where a reasoning trace begins and ends inside an assistant's text: the table of think markers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple


class MarkerPair(NamedTuple):
    """An opening and a closing think marker that belong together.

    Attributes:
        opening: text that starts the trace.
        closing: text that ends it.
    """

    opening: str
    closing: str


MARKERS: tuple[MarkerPair, ...] = (
    MarkerPair("<think>", "</think>"),
    MarkerPair("<thinking>", "</thinking>"),
    MarkerPair("<reasoning>", "</reasoning>"),
    MarkerPair("<thought>", "</thought>"),
    MarkerPair("<thoughts>", "</thoughts>"),
    MarkerPair("<|begin_of_thought|>", "<|end_of_thought|>"),
    MarkerPair("[THINK]", "[/THINK]"),
    MarkerPair("<|START_THINKING|>", "<|END_THINKING|>"),
    MarkerPair("<seed:think>", "</seed:think>"),
    MarkerPair("◁think▷", "◁/think▷"),
)

Case = Literal["both", "close_only", "open_only", "field", "whole"]


@dataclass(frozen=True)
class TraceText:
    """A text cut at its think markers; the five parts laid end to end are the text again.

    Attributes:
        prefix: text before the opening marker.
        opening: the opening marker, or empty.
        body: the trace.
        closing: the closing marker, or empty.
        rest: the solution after the closing marker.
        case: `both` markers found; `close_only`: the opening one belongs to the generation prompt;
            `open_only`: the trace was cut before its end; `field`: the record keeps the trace in a field of
            its own; `whole`: a text without markers that is a trace up to its final answer.
        several: the body holds a closing marker and an opening one after it, that is, visible text between
            two traces of one turn.
    """

    prefix: str
    opening: str
    body: str
    closing: str
    rest: str
    case: Case
    several: bool = False


def split_trace(text: str) -> TraceText | None:
    """Cut a text at its think markers.

    One pair of the table is used, and pairs never cross. A pair with both markers is preferred to one with
    the closing marker alone, and that to one with the opening marker alone; among equals the one that starts
    first in the text, then the one that stands first in the table. The trace runs to the *last* closing
    marker, since a trace may quote it.

    Args:
        text: an assistant's text.

    Returns:
        The parts, or None when the text holds no marker.
    """
    found: list[tuple[int, int, MarkerPair, int, int]] = []
    for pair in MARKERS:
        first_open = text.find(pair.opening)
        last_close = text.rfind(pair.closing)
        if 0 <= first_open < last_close:
            found.append((0, first_open, pair, first_open, last_close))
        elif last_close >= 0:
            # An opening marker after it belongs to the solution (a quotation, or a second, unfinished trace).
            found.append((1, last_close, pair, -1, last_close))
        elif first_open >= 0:
            found.append((2, first_open, pair, first_open, -1))
    if not found:
        return None
    rank, _, pair, start, end = min(found, key=lambda item: item[:2])
    if rank == 2:
        after = start + len(pair.opening)
        return TraceText(text[:start], pair.opening, text[after:], "", "", "open_only")
    opening = pair.opening if rank == 0 else ""
    prefix = text[:start] if rank == 0 else ""
    body = text[len(prefix) + len(opening) : end]
    inner = body.find(pair.closing)
    several = inner >= 0 and body.find(pair.opening, inner) >= 0
    return TraceText(
        prefix,
        opening,
        body,
        pair.closing,
        text[end + len(pair.closing) :],
        "both" if rank == 0 else "close_only",
        several,
    )
