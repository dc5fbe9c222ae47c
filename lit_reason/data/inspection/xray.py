"""The X-ray of a row: its spans as the loss sees them, and what is wrong with them.

`examine` asks what a trainer cannot see in its loss: does training begin with the prompt that generation will
use, is the end trained, is the think block there once and whole, does the answer follow from the text left.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from lit_reason.data.condensation.answers import answer_follows, final_answer
from lit_reason.data.condensation.markers import MARKERS, TraceText
from lit_reason.data.condensation.turn_trace import find_trace
from lit_reason.data.conversation import Conversation, Message, Trace
from lit_reason.data.rendering.chat_template import TemplateMismatch, reasoning_parts
from lit_reason.data.rendering.contract import RULES, breaches, supervised_stretches
from lit_reason.data.rendering.render import Renderer
from lit_reason.data.rendering.template_traits import opened_marker
from lit_reason.data.token_row import SEGMENT_NAMES, Segment, TokenRow
from lit_reason.errors import EmptyMask, RowError

# Kinds of findings, in the order in which they are told.
KINDS: dict[str, str] = {
    "empty_mask": "no token is trained",
    "end_untrained": "an end token is not trained",
    "think_doubled": "the think block is doubled",
    "think_emptied": "the think block is emptied",
    "think_dropped": "the think block is dropped",
    "think_unclosed": "the think block is never closed",
    "prompt_differs": "training and generation prompts disagree",
    "answer_lost": "the answer does not follow from the text left",
    "text_lost": "text of a trained turn is lost",
    "padding_trained": "the padding token is trained",
    "too_long": "longer than max_length, which stops a run",
    "contract": "the template breaks the contract with generation",
}
_OF_RULE = {
    "turns": "text_lost",
    "prompt": "prompt_differs",
    "end": "end_untrained",
    "padding": "padding_trained",
    "text": "text_lost",
}


class Finding(NamedTuple):
    """Something wrong with a row.

    Attributes:
        kind: a key of `KINDS`.
        row_id: the row.
        detail: what was found.
    """

    kind: str
    row_id: str
    detail: str

    def __str__(self) -> str:
        return f"{self.row_id}: {KINDS[self.kind]}: {self.detail}"


@dataclass(frozen=True)
class Span:
    """Neighbouring tokens of one segment, loss weight and decile.

    Attributes:
        first: index of its first token.
        stop: index after its last.
        segment: what it is part of.
        weight: loss weight of each of its tokens; 0 is not trained.
        decile: decile of its thought in the full trace, -1 outside thoughts.
        text: its tokens in words. The texts of all spans, joined, are the text of the row.
    """

    first: int
    stop: int
    segment: Segment
    weight: float
    decile: int
    text: str

    @property
    def name(self) -> str:
        """The segment in words."""
        return SEGMENT_NAMES[self.segment].replace("_", " ")

    @property
    def trained(self) -> bool:
        """Whether its tokens have a loss."""
        return self.weight > 0

    def __len__(self) -> int:
        return self.stop - self.first


def spans(row: TokenRow, decode: Callable[[list[int]], str]) -> list[Span]:
    """Cut a row into spans that tile it.

    Args:
        row: a row of T tokens.
        decode: token ids to text.

    Returns:
        Spans in order, from token 0 to token T. A character whose bytes lie in two spans belongs to the later.
    """
    size = len(row)
    if not size:
        return []
    changes = np.zeros(size, dtype=bool)
    for labels in (row.segment, row.weight, row.decile):
        changes[1:] |= labels[1:] != labels[:-1]
    borders = [0, *np.flatnonzero(changes).tolist(), size]
    found, before = [], ""
    for first, stop in zip(borders[:-1], borders[1:], strict=True):
        text = decode(row.ids[:stop].tolist())
        if stop < size:
            text = text.rstrip("\ufffd")  # the first bytes of a character that the next span completes
        shared = len(os.path.commonprefix((before, text)))
        found.append(
            Span(
                first,
                stop,
                Segment(int(row.segment[first])),
                float(row.weight[first]),
                int(row.decile[first]),
                text[shared:],
            )
        )
        before = text
    return found


def kept_thoughts(trace: Trace) -> str:
    """Which thoughts of a trace are left, counted from 1: `1-3, 9-10 of 10`.

    Args:
        trace: of a condensed turn.
    """
    runs: list[list[int]] = []
    for origin in trace.origin:
        if runs and origin == runs[-1][1] + 1:
            runs[-1][1] = origin
        else:
            runs.append([origin, origin])
    shown = [f"{a + 1}" if a == b else f"{a + 1}-{b + 1}" for a, b in runs]
    return f"{', '.join(shown) or 'none'} of {trace.total}"


# ---- findings


def examine(renderer: Renderer, conversation: Conversation) -> tuple[list[TokenRow], list[Finding]]:
    """Render a conversation and look for what is wrong.

    Args:
        renderer: of the run.
        conversation: after condensation.

    Returns:
        Its rows, and the findings; no rows where the template cannot write the conversation.

    Raises:
        RowError: the row cannot be used for a reason of its own, the template has no part in it.
    """
    name = conversation.row_id
    try:
        rows = renderer.rows(conversation)
    except EmptyMask as error:
        return [], [Finding("empty_mask", name, str(error))]
    except TemplateMismatch as error:
        return [], diagnose(renderer, conversation, error)
    found = [
        Finding(_OF_RULE[breach.rule], breach.row_id, f"not {RULES[breach.rule]}: {breach.what}")
        for breach in breaches(renderer, conversation, rows)
    ]
    for row in rows:
        found += _end_findings(renderer, row)
        found += _doubled_findings(renderer, conversation, row, alone=len(rows) == 1)
    lost = answer_finding(conversation)
    return rows, [*found, lost] if lost else found


def diagnose(renderer: Renderer, conversation: Conversation, error: TemplateMismatch) -> list[Finding]:
    """What is wrong with a conversation that the renderer refuses, read from the template's own text.

    Args:
        renderer: of the run.
        conversation: after condensation.
        error: the refusal.

    Returns:
        At least one finding.
    """
    name, found = conversation.row_id, []
    for turn, message in enumerate(conversation.messages):
        if not message.trained:
            continue
        prompt, full = renderer.written(conversation, turn)
        by_template = renderer.config.turn_text == "template" and not message.truncated
        defects = (
            _template_defects(renderer, message, prompt, full) if by_template else _verbatim_defects(message, prompt)
        )
        found += [Finding(kind, name, detail) for kind, detail in defects]
    return list(dict.fromkeys(found)) or [Finding("text_lost", name, str(error))]


def _template_defects(renderer: Renderer, message: Message, prompt: str, full: str) -> Iterator[tuple[str, str]]:
    """Defects of one turn as the template writes it."""
    shared = len(os.path.commonprefix((prompt, full)))
    if shared < len(prompt):
        ahead, instead = prompt[shared:][:40], full[shared:][:40]
        yield "prompt_differs", f"the generation prompt goes on {ahead!r} where the turn has {instead!r}"
    tokens = renderer.encoder.encode(full)
    first = int(np.searchsorted(tokens.end, shared, side="right"))  # the first token that is not all prompt
    start = min(shared, int(tokens.start[first])) if first < len(tokens.start) else shared
    span, opened = full[start:], opened_marker(full[:start])
    pair = renderer.traits.pair if renderer.traits else MARKERS[0]
    yield from think_defects(reasoning_parts(message, *pair), span, opened=opened is not None)
    if opened and not any(pair.closing in span for pair in MARKERS):
        yield "think_unclosed", f"the prompt opens {opened.opening} and the turn does not close it"
    if not np.isin(tokens.ids[first:], renderer.stop_ids).any():
        stops = ", ".join(renderer.tokenizer.convert_ids_to_tokens(list(renderer.stop_ids)))
        yield "end_untrained", f"no end token ({stops}) after the turn, which ends {full[-40:]!r}"


def _verbatim_defects(message: Message, prompt: str) -> Iterator[tuple[str, str]]:
    """Defects of one turn that stands as the record has it."""
    opened = opened_marker(prompt)
    parts = reasoning_parts(message, *MARKERS[0])
    if opened and not message.truncated and (parts is None or not parts.closing):
        yield "think_unclosed", f"the prompt opens {opened.opening} and the turn does not close it"


def think_defects(parts: TraceText | None, span: str, *, opened: bool) -> Iterator[tuple[str, str]]:
    """Whether a turn's text holds its think block once, with its thoughts in it.

    Args:
        parts: the turn as the record has it; None for one without thoughts.
        span: the turn as it is written, from the end of the prompt.
        opened: the prompt's last words open the block.

    Yields:
        Kind of finding and detail.
    """
    quoted = parts.prefix + parts.body + parts.rest if parts else ""
    blocks = _openings(span) - _openings(quoted) + opened
    if blocks > 1:
        yield "think_doubled", f"it is opened {blocks} times in {_short(span)!r}"
    if parts is None or not parts.body.strip() or _squash(parts.body) in _squash(span):
        return
    kind = "think_emptied" if _EMPTY.search(span) else "think_dropped"
    yield kind, f"{_short(parts.body.strip())!r} is not in {_short(span)!r}"


def answer_finding(conversation: Conversation) -> Finding | None:
    """A finding where the last trained turn no longer yields the row's reference answer.

    Args:
        conversation: after condensation.
    """
    turns = [m for m in conversation.messages if m.trained]
    if conversation.answer is None or not turns or turns[-1].tool_calls:
        return None
    parts = find_trace(turns[-1])
    solution = parts.rest if parts else turns[-1].content
    left = f"{parts.body}\n{solution}" if parts else solution
    if answer_follows(solution, conversation.answer) or answer_follows(left, conversation.answer):
        return None
    found = final_answer(left)
    yields = "no answer" if found is None else _short(repr(found))
    detail = f"the reference is {_short(repr(conversation.answer))}, the text left yields {yields}"
    return Finding("answer_lost", conversation.row_id, detail)


def _end_findings(renderer: Renderer, row: TokenRow) -> Iterator[Finding]:
    untrained = np.flatnonzero((row.segment == Segment.END) & (row.weight == 0))
    if len(untrained):
        token = renderer.tokenizer.convert_ids_to_tokens(int(row.ids[untrained[0]]))
        yield Finding("end_untrained", row.row_id, f"{token} at token {untrained[0]} has loss weight 0")


def _doubled_findings(renderer: Renderer, conversation: Conversation, row: TokenRow, alone: bool) -> Iterator[Finding]:
    """Think blocks counted in the row's own tokens, whoever wrote them."""
    stretches = supervised_stretches(row)
    turns = [m for m in conversation.messages if m.trained]
    if not alone:  # a row for each turn: this row's number stands at the end of its name
        turns = [turns[int(row.row_id.rpartition("#")[2]) - 1]]
    pair = renderer.traits.pair if renderer.traits else MARKERS[0]
    for message, (first, stop) in zip(turns[-len(stretches) :], stretches, strict=False):
        if message.role == "text":
            continue
        span = decoded(renderer, row.ids[first:stop].tolist())
        opened = opened_marker(decoded(renderer, row.ids[max(first - 32, 0) : first].tolist())) is not None
        for kind, detail in think_defects(reasoning_parts(message, *pair), span, opened=opened):
            if kind == "think_doubled":  # that the thoughts come back from the tokens is the contract's
                yield Finding(kind, row.row_id, detail)


def decoded(renderer: Renderer, ids: Sequence[int]) -> str:
    """Token ids as text, special tokens and blanks as they are.

    Args:
        renderer: whose tokenizer to use.
        ids: token ids.
    """
    return renderer.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)


def as_written(renderer: Renderer, conversation: Conversation | None) -> str:
    """What the chat template makes of a record that could not be rendered, up to its last trained turn.

    Args:
        renderer: of the run.
        conversation: after condensation, or None.

    Returns:
        The text, the template's own refusal, or an empty text where there is nothing to write.
    """
    turns = [i for i, m in enumerate(conversation.messages) if m.trained] if conversation else []
    if conversation is None or not turns:
        return ""
    try:
        return renderer.written(conversation, turns[-1])[1]
    except RowError as error:
        return str(error)


_EMPTY = re.compile("|".join(f"{re.escape(p.opening)}\\s*{re.escape(p.closing)}" for p in MARKERS))


def _openings(text: str) -> int:
    return sum(text.count(pair.opening) for pair in MARKERS)


def _squash(text: str) -> str:
    return "".join(text.split())


def _short(text: str, limit: int = 80) -> str:
    return text if len(text) <= limit else f"{text[: limit // 2]} ... {text[-limit // 2 :]}"
