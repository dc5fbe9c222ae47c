"""The contract between a chat template and training, checked on the user's own rows before the first step.

Properties: (1) a row begins with the very ids that generation is prompted with, so the loss is on what the
model will have to write, default system text included; (2) the rows decode to the texts of the trained
turns; (3) each trained turn has exactly one supervised end token, and generation stops at it; (4) the
padding token is no supervised token; (5) thoughts are neither dropped nor doubled nor put into an empty
block.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from lit_reason.data.condensation.markers import MARKERS
from lit_reason.data.conversation import Conversation, Message
from lit_reason.data.rendering import template_traits as probe
from lit_reason.data.rendering.chat_template import TemplateMismatch, reasoning_parts
from lit_reason.data.rendering.render import Renderer
from lit_reason.data.rendering.template_traits import TemplateTraits
from lit_reason.data.token_row import Segment, TokenRow
from lit_reason.errors import RowError, UserError

RULES = {
    "turns": "one trained stretch per trained turn",
    "prompt": "training begins with generation's prompt",
    "end": "one supervised end token per trained turn",
    "padding": "the padding token is not supervised",
    "text": "the text of a trained turn comes back from its tokens",
}


class Breach(NamedTuple):
    """A rule that a row breaks.

    Attributes:
        rule: a key of `RULES`.
        row_id: the row.
        what: what was found.
    """

    rule: str
    row_id: str
    what: str


@dataclass(frozen=True)
class ContractReport:
    """What the check found.

    Attributes:
        checked: conversations of the user that were rendered and checked.
        refused: reasons why others could not be rendered, with their counts.
        notes: things worth knowing, in sentences.
        end_token: text of the token that ends a turn.
        pad_token: text of the token to pad with in generation.
        traits: what the chat template does; None in plain mode.
    """

    checked: int
    refused: Counter[str]
    notes: list[str] = field(default_factory=list)
    end_token: str = ""
    pad_token: str = ""
    traits: TemplateTraits | None = None


def check_contract(renderer: Renderer, conversations: Sequence[Conversation]) -> ContractReport:
    """Check the contract on some rows of the user and on probe conversations.

    A row that cannot be rendered for a reason of its own is counted, not raised: it goes to quarantine
    later. A row that fails because of what the template does to every row of its kind stops the run here.

    Args:
        renderer: of the run.
        conversations: the first rows, after condensation.

    Returns:
        The report.

    Raises:
        UserError: a property does not hold. Names the row, the property, the text around, and the way out.
    """
    failing = _failing_probes(renderer)
    refused: Counter[str] = Counter()
    example: dict[str, str] = {}
    checked = 0
    for conversation in conversations:
        try:
            rows = renderer.rows(conversation)
        except RowError as error:
            systematic = isinstance(error, TemplateMismatch) and not failing.keys().isdisjoint(_kinds(conversation))
            if systematic:
                raise UserError(f"{conversation.row_id}: {error}") from error
            refused[str(error)] += 1
            example.setdefault(str(error), conversation.row_id)
            continue
        _check_rows(renderer, conversation, rows)
        checked += 1
    if conversations and not checked:
        reason, count = refused.most_common(1)[0]
        raise UserError(
            f"none of the first {len(conversations)} rows can be rendered; {example[reason]} and "
            f"{count - 1} more: {reason}"
        )
    tokenizer = renderer.tokenizer
    end_id = renderer.stop_ids[0] if not renderer.traits else renderer.traits.end_id
    return ContractReport(
        checked=checked,
        refused=refused,
        notes=_notes(renderer, failing, refused),
        end_token="" if end_id is None else str(tokenizer.convert_ids_to_tokens(end_id)),
        pad_token=str(tokenizer.convert_ids_to_tokens(renderer.pad_id)),
        traits=renderer.traits,
    )


def probe_conversations(traits: TemplateTraits) -> dict[str, Conversation]:
    """Small conversations that show what a template does, by kind: `answer`, `thoughts`, `history`, `tools`.

    Args:
        traits: of the template; decides whether a system turn is taken.
    """
    question = Message("user", probe.QUESTION)
    answer = Message("assistant", probe.ANSWER, trained=True)
    opening, closing = traits.pair
    thinking = replace(answer, content=f"{opening}\n{probe.THOUGHTS}\n{closing}\n\n{probe.ANSWER}")
    call = Message("assistant", "", tool_calls=(probe.CALL,), trained=True)
    result = Message("tool", '{"peeled": true}', name="peel_kumquat", tool_call_id="call00001")
    system = (Message("system", probe.SYSTEM),) if traits.system else ()
    kinds: dict[str, tuple[Message, ...]] = {
        "answer": (*system, question, answer),
        "thoughts": (question, thinking),
        "history": (*system, question, thinking, question, thinking),
        "tools": (question, call, result, answer),
    }
    tools: tuple[dict[str, Any], ...] = (probe.TOOL,)
    return {
        kind: Conversation(messages, f"probe:{kind}", tools if kind == "tools" else ())
        for kind, messages in kinds.items()
    }


def _failing_probes(renderer: Renderer) -> dict[str, str]:
    """Kinds of probe conversations that cannot be rendered, with the reason; the others are checked in
    full.
    """
    failing: dict[str, str] = {}
    if renderer.traits is None or not _knows_the_words(renderer):
        return failing
    for kind, conversation in probe_conversations(renderer.traits).items():
        try:
            rows = renderer.rows(conversation)
        except RowError as error:
            failing[kind] = str(error)
            continue
        _check_rows(renderer, conversation, rows)
    return failing


def _knows_the_words(renderer: Renderer) -> bool:
    """Whether the tokenizer can write the probes at all (one for a toy language cannot)."""
    text = f"{probe.SYSTEM} {probe.QUESTION} {probe.THOUGHTS} {probe.ANSWER} {probe.CALL} {probe.TOOL}"
    try:
        decoded = renderer.tokenizer.decode(renderer.encoder.encode(text).ids.tolist())
    except RowError:
        return False
    return _squash(renderer, decoded) == _squash(renderer, text)


def _kinds(conversation: Conversation) -> set[str]:
    """Which probes are of the same kind as a conversation of the user."""
    turns = [m for m in conversation.messages if m.trained]
    thinking = [m for m in turns if reasoning_parts(m, *MARKERS[0]) is not None]
    kinds = {"answer"} if len(thinking) < len(turns) else set()
    if thinking:
        kinds |= {"thoughts"} | ({"history"} if len(turns) > 1 else set())
    return kinds | ({"tools"} if any(m.tool_calls for m in turns) else set())


def breaches(renderer: Renderer, conversation: Conversation, rows: Sequence[TokenRow]) -> Iterator[Breach]:
    """Where the rows of a conversation break the contract.

    Args:
        renderer: what rendered them.
        conversation: the conversation.
        rows: all its rows, in order.
    """
    trained = [i for i, m in enumerate(conversation.messages) if m.trained]
    if renderer.config.train_on == "last":
        trained = trained[-1:]
    groups = [(rows[0], trained)] if len(rows) == 1 else [(r, [k]) for r, k in zip(rows, trained, strict=True)]
    for row, turns in groups:
        spans = supervised_stretches(row)
        if len(spans) != len(turns):
            yield Breach("turns", row.row_id, f"{len(spans)} of {len(turns)}")
            continue
        for turn, (first, stop) in zip(turns, spans, strict=True):
            yield from _check_prompt(renderer, conversation, row, turn, first)
            yield from _check_text(renderer, conversation.messages[turn], row, first, stop)


def _check_rows(renderer: Renderer, conversation: Conversation, rows: Sequence[TokenRow]) -> None:
    """Raise the first breach."""
    for breach in breaches(renderer, conversation, rows):
        raise _broken(breach, renderer)


def supervised_stretches(row: TokenRow) -> list[tuple[int, int]]:
    """Runs of tokens that are no prompt, each cut after its end token.

    Args:
        row: a rendered row.

    Returns:
        First token, and the token after the last, of each.
    """
    inside, ends = row.segment != Segment.PROMPT, row.segment == Segment.END
    begins, stops = inside.copy(), inside.copy()
    begins[1:] &= ~inside[:-1] | ends[:-1]
    stops[:-1] &= ~inside[1:] | ends[:-1]
    return list(zip(np.flatnonzero(begins).tolist(), (np.flatnonzero(stops) + 1).tolist(), strict=True))


def _check_prompt(
    renderer: Renderer, conversation: Conversation, row: TokenRow, turn: int, first: int
) -> Iterator[Breach]:
    """Property 1: the ids before a trained turn are those that generation is prompted with."""
    prompt = renderer.prompt_before(conversation, turn)
    if row.ids[:first].tolist() == prompt:
        return
    tokens = renderer.tokenizer.convert_ids_to_tokens
    at = next((i for i, (a, b) in enumerate(zip(row.ids, prompt, strict=False)) if a != b), min(first, len(prompt)))
    seen, wanted = tokens(row.ids[at : at + 6].tolist()), tokens(prompt[at : at + 6])
    yield Breach("prompt", row.row_id, f"training has {seen}, generation has {wanted}")


def _check_text(renderer: Renderer, message: Message, row: TokenRow, first: int, stop: int) -> Iterator[Breach]:
    """Properties 2 to 4 for one trained turn."""
    ids, segment = row.ids[first:stop], row.segment[first:stop]
    ends = ids[segment == Segment.END]
    stops = int(np.isin(ids, renderer.stop_ids).sum())
    closed = 0 if message.truncated else 1
    if len(ends) != closed or stops != closed:
        yield Breach("end", row.row_id, f"{len(ends)} marked, {stops} present")
    if renderer.pad_id not in renderer.stop_ids and (ids == renderer.pad_id).any():
        token = renderer.tokenizer.convert_ids_to_tokens(renderer.pad_id)
        what = f"the trained text writes out {token}; set another pad_token in tokenizer_config.json"
        yield Breach("padding", row.row_id, what)
    decoded = _squash(renderer, renderer.tokenizer.decode(ids[: len(ids) - closed].tolist()))
    parts = reasoning_parts(message, *MARKERS[0])
    wanted = [parts.prefix, parts.body, parts.rest] if parts else [message.content]
    unknown = renderer.tokenizer.unk_token_id
    for text in wanted:
        if _squash(renderer, text) not in decoded:
            lost = unknown is not None and unknown in ids.tolist()
            why = "the tokenizer does not know some of its characters" if lost else f"decoded: {decoded[:80]!r}"
            yield Breach("text", row.row_id, f"{text[:80]!r}; {why}")
            return


def _squash(renderer: Renderer, text: str) -> str:
    """A text up to what a tokenizer may change: its own normalisation, and blanks."""
    normalizer = renderer.tokenizer.backend_tokenizer.normalizer
    text = normalizer.normalize_str(text) if normalizer is not None else text
    return re.sub(r"[\s\u2581]+", "", text)


def _broken(breach: Breach, renderer: Renderer) -> UserError:
    way_out = (
        "give a consistent template with lm.chat_template, or set render.turn_text=verbatim"
        if renderer.mode == "chat"
        else "check the tokenizer"
    )
    rule = RULES[breach.rule]
    return UserError(f"{breach.row_id}: the contract '{rule}' is broken: {breach.what}; {way_out}")


def _notes(renderer: Renderer, failing: dict[str, str], refused: Counter[str]) -> list[str]:
    tokenizer, traits = renderer.tokenizer, renderer.traits
    notes = [f"{count} of the first rows refused: {reason}" for reason, count in refused.most_common()]
    name = tokenizer.convert_ids_to_tokens
    if renderer.pad_id in renderer.stop_ids:
        notes.append(
            f"padding uses the end token {name(renderer.pad_id)}: the tokenizer has no spare token; the "
            "loss here "
            "masks by position, but do not mask labels by this id elsewhere"
        )
    elif renderer.pad_id != tokenizer.pad_token_id:
        own = "no padding token" if tokenizer.pad_token_id is None else "its end token for padding"
        notes.append(f"the tokenizer has {own}; {name(renderer.pad_id)} is used instead")
    if traits is None:
        return [*notes, "no chat template: prompt and completion are joined as they are"]
    for kind, reason in failing.items():
        if kind == "answer" or (kind == "tools" and not traits.tool_calls):
            continue
        notes.append(f"rows with {kind} will be refused: {reason}")
    facts = (
        (not traits.tool_calls, "the template does not write tool calls: rows with them will be refused"),
        (not traits.lists_tools, "the template does not list the tools on offer in the prompt"),
        (
            traits.opens_think,
            "the generation prompt opens the think block: its opening marker is not trained",
        ),
        (
            traits.strips_history,
            "the template drops thoughts of earlier turns: one row per trained turn then",
        ),
        (
            traits.empty_think and not traits.opens_think,
            "the template gives turns without thoughts an empty think block, and it is trained",
        ),
        (not traits.system, "the template takes no system turn"),
        (traits.dated, "the template writes today's date: prompts differ from day to day"),
        (
            traits.default_system is not None,
            f"the template adds a system text, in training and generation: {traits.default_system!r}",
        ),
    )
    return notes + [note for holds, note in facts if holds]
