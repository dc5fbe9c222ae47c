"""What a chat template does, found out by rendering probe conversations, not by knowing the model family."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lit_reason.data.condensation.markers import MARKERS, MarkerPair
from lit_reason.errors import RowError, UserError

Render = Callable[..., str]

REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")  # fields that templates read thoughts from

SYSTEM = "Answer as a botanist would."
QUESTION = "Which colour has a kumquat?"
THOUGHTS = "A ripe peel comes to mind."
ANSWER = "It is vermilion."
CALL = {
    "type": "function",
    "id": "call00001",  # nine letters or digits: some templates insist
    "function": {"name": "peel_kumquat", "arguments": {"depth": 3}},
}
TOOL = {
    "type": "function",
    "function": {
        "name": "peel_kumquat",
        "description": "Peels one.",
        "parameters": {
            "type": "object",
            "properties": {"depth": {"type": "integer", "description": "in millimetres"}},
            "required": ["depth"],
        },
    },
}


@dataclass(frozen=True)
class TemplateTraits:
    """How a chat template writes an assistant's turn.

    Attributes:
        lead: text between the generation prompt and the content of a turn without thoughts.
        tail: text after the content, to the end of the turn.
        end_id: id of the token that ends a turn; None when the template closes no turn.
        end_text: its text.
        tool_end_id: the same for a turn that ends with a tool call; None without tool calls.
        pair: think markers of this model: those the template writes, or the first pair of the table.
        opens_think: the generation prompt ends with the opening marker.
        inline: thoughts that stand inside the content come out once, in the last turn.
        field: name of the message field that the template reads thoughts from, None when it reads none.
        strips_history: thoughts of earlier turns disappear once another turn follows.
        empty_think: a turn without thoughts gets an empty think block.
        system: the template takes a system message.
        default_system: system text the template adds on its own; None when it adds none.
        tool_calls: tool calls of an assistant's turn are written.
        lists_tools: the tools on offer stand in the prompt.
        generation_markers: the template has `{% generation %}` blocks (not needed here).
        dated: the template asks for today's date, so its prompts change from day to day.
    """

    lead: str
    tail: str
    end_id: int | None
    end_text: str
    tool_end_id: int | None
    pair: MarkerPair
    opens_think: bool
    inline: bool
    field: str | None
    strips_history: bool
    empty_think: bool
    system: bool
    default_system: str | None
    tool_calls: bool
    lists_tools: bool
    generation_markers: bool
    dated: bool


def opened_marker(prompt: str) -> MarkerPair | None:
    """The pair whose opening marker ends a prompt, or None.

    Args:
        prompt: a rendered generation prompt.
    """
    end = prompt[-64:].rstrip()
    return next((pair for pair in MARKERS if end.endswith(pair.opening)), None)


def probe_template(render: Render, tokenizer: Any, source: str, stop_ids: Sequence[int]) -> TemplateTraits:
    """Render a few short conversations and read off what the template does.

    Args:
        render: `render(messages, tools, prompt=bool) -> str`; raises RowError where the template refuses.
        tokenizer: a fast tokenizer.
        source: text of the template.
        stop_ids: end-of-sequence ids known beforehand.

    Returns:
        The traits.

    Raises:
        UserError: the template cannot render one question and one answer, or loses their text.
    """
    user = {"role": "user", "content": QUESTION}
    try:
        prompt = render([user], prompt=True)
        full = render([user, {"role": "assistant", "content": ANSWER}])
    except RowError as error:
        raise UserError(
            f"the chat template cannot render one question and one answer: {error}; "
            "give a working one with lm.chat_template"
        ) from error
    for text, where in ((QUESTION, prompt), (ANSWER, full)):
        if text not in where:
            raise UserError(f"the chat template loses the text of a turn: {text!r} is not in {where!r}")
    at = full.rindex(ANSWER)
    tail = full[at + len(ANSWER) :]
    end_id = _first_end(tokenizer, tail, stop_ids)
    opened = opened_marker(prompt)
    lead = full[len(prompt) : at] if full.startswith(prompt) else ""
    field, written = _reasoning_field(render, user, prompt)
    pair = opened or written or MARKERS[0]
    inline = _single_block(_inline(render, user, pair), prompt, pair)
    system, default_system = _system(render, user)
    tool_calls, lists_tools, tool_end = _tools(render, tokenizer, user, stop_ids)
    return TemplateTraits(
        lead=lead,
        tail=tail,
        end_id=end_id,
        end_text="" if end_id is None else tokenizer.convert_ids_to_tokens(end_id),
        tool_end_id=tool_end,
        pair=pair,
        opens_think=opened is not None,
        inline=inline,
        field=field,
        strips_history=_strips_history(render, user, _thinking_turn(pair, None if inline else field)),
        empty_think=pair.closing in lead,
        system=system,
        default_system=default_system,
        tool_calls=tool_calls,
        lists_tools=lists_tools,
        generation_markers=re.search(r"\{%-?\s*generation\b", source) is not None,
        dated="strftime_now" in source,
    )


def _special_ids(tokenizer: Any, stop_ids: Sequence[int]) -> set[int]:
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | set(tokenizer.all_special_ids) | set(stop_ids)


def _first_end(tokenizer: Any, tail: str, stop_ids: Sequence[int]) -> int | None:
    """The token that ends a turn: the first special token after its content, else the first added one."""
    ids = tokenizer(tail, add_special_tokens=False)["input_ids"]
    for known in (_special_ids(tokenizer, stop_ids), set(tokenizer.added_tokens_decoder)):
        found = next((i for i in ids if i in known), None)
        if found is not None:
            return found
    return None


def _thinking_turn(pair: MarkerPair, field: str | None) -> dict[str, Any]:
    if field:
        return {"role": "assistant", "content": ANSWER, field: THOUGHTS}
    return {"role": "assistant", "content": f"{pair.opening}\n{THOUGHTS}\n{pair.closing}\n\n{ANSWER}"}


def _try(render: Render, messages: Sequence[Mapping[str, Any]], *more: Any, **options: Any) -> str:
    try:
        return render(messages, *more, **options)
    except RowError:
        return ""


def _inline(render: Render, user: Mapping[str, Any], pair: MarkerPair) -> str:
    return _try(render, [user, _thinking_turn(pair, None)])


def _single_block(full: str, prompt: str, pair: MarkerPair) -> bool:
    """Whether thoughts and answer stand once, in order, in one block of markers, after the generation
    prompt.
    """
    if not full.startswith(prompt):
        return False
    opened = opened_marker(prompt)
    turn = full[len(prompt) :]
    return (
        turn.count(THOUGHTS) == 1
        and turn.count(ANSWER) == 1
        and turn.count(pair.opening) + (opened == pair) == 1
        and turn.count(pair.closing) == 1
        and turn.index(THOUGHTS) < turn.index(pair.closing) < turn.index(ANSWER)
    )


def _reasoning_field(render: Render, user: Mapping[str, Any], prompt: str) -> tuple[str | None, MarkerPair | None]:
    """The message field that the template writes as one think block, and the markers it writes around it."""
    for key in REASONING_KEYS:
        full = _try(render, [user, _thinking_turn(MARKERS[0], key)])
        for pair in MARKERS:
            if _single_block(full, prompt, pair):
                return key, pair
    return None, None


def _strips_history(render: Render, user: Mapping[str, Any], turn: Mapping[str, Any]) -> bool:
    last = _try(render, [user, turn])
    earlier = _try(render, [user, turn, user])
    return THOUGHTS in last and ANSWER in earlier and THOUGHTS not in earlier


def _system(render: Render, user: Mapping[str, Any]) -> tuple[bool, str | None]:
    """Whether a system message is taken, and the text that stands in its place when there is none."""
    given = _try(render, [{"role": "system", "content": SYSTEM}, user])
    if SYSTEM not in given:
        return False, None
    before, _, after = given.partition(SYSTEM)
    bare = render([user])
    if bare.startswith(before) and bare.endswith(after) and len(bare) > len(before) + len(after):
        return True, bare[len(before) : len(bare) - len(after)]
    return True, None


def _tools(
    render: Render, tokenizer: Any, user: Mapping[str, Any], stop_ids: Sequence[int]
) -> tuple[bool, bool, int | None]:
    """Whether calls are written, whether tools are listed, and the token that ends a turn of calls."""
    prompt = _try(render, [user], [TOOL], prompt=True)
    full = _try(render, [user, {"role": "assistant", "content": "", "tool_calls": [CALL]}], [TOOL])
    name = TOOL["function"]["name"]  # type: ignore[index]
    listed = name in prompt
    if not full or full.count(name) <= prompt.count(name):
        return False, listed, None
    ids = tokenizer(full[full.rindex(name) :], add_special_tokens=False)["input_ids"]
    special = _special_ids(tokenizer, stop_ids)
    return True, listed, next((i for i in reversed(ids) if i in special), None)
