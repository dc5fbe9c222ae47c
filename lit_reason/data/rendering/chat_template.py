"""The chat template of a tokenizer: rendering, and the shape in which each message is handed to it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2

from lit_reason.data.condensation.markers import MARKERS, TraceText, split_trace
from lit_reason.data.conversation import Message
from lit_reason.data.rendering.template_traits import opened_marker, probe_template
from lit_reason.errors import RowError, UserError


class TemplateMismatch(RowError):
    """The template does not write what was said: it drops, doubles or rewrites text, or breaks the prompt."""


class ChatTemplate:
    """A tokenizer's chat template with its traits.

    Args:
        tokenizer: a fast tokenizer with a chat template.
        template_kwargs: variables for the template, such as `enable_thinking`.
        stop_ids: end-of-sequence ids known beforehand.

    Attributes:
        traits: what the template does (`TemplateTraits`).

    Raises:
        UserError: the template has a syntax error or cannot render a question and an answer.
    """

    def __init__(
        self, tokenizer: Any, template_kwargs: Mapping[str, Any] | None = None, stop_ids: Sequence[int] = ()
    ) -> None:
        self._tokenizer = tokenizer
        self._kwargs = dict(template_kwargs or {})
        self.source: str = tokenizer.get_chat_template()
        try:
            self.traits = probe_template(self.render, tokenizer, self.source, stop_ids)
        except jinja2.TemplateSyntaxError as error:
            raise UserError(f"the chat template has a syntax error in line {error.lineno}: {error.message}") from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] = (),
        *,
        prompt: bool = False,
    ) -> str:
        """Render messages, as `messages` shaped them.

        Args:
            messages: the turns.
            tools: JSON schemas of the tools on offer.
            prompt: end with the generation prompt of an assistant's turn.

        Returns:
            The text.

        Raises:
            RowError: the template refuses the conversation; the message is the template's own.
        """
        if not messages:
            raise RowError("the conversation starts with a trained assistant turn, so it has no prompt")
        try:
            return self._tokenizer.apply_chat_template(
                list(messages),
                tools=list(tools) or None,
                add_generation_prompt=prompt,
                tokenize=False,
                **self._kwargs,
            )
        except jinja2.TemplateSyntaxError:
            raise
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
            raise RowError(f"the chat template refuses this conversation: {error}") from error

    def messages(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        """The messages in the shape the template reads.

        Thoughts stay where the record has them, inside the content or in a field, unless this template
        writes only the other form: then they move there. A text that has the closing marker alone gets its
        opening one, which a generation prompt had kept.

        Args:
            messages: turns of a conversation.
        """
        return [self._assistant(m) if m.role == "assistant" else _other(m) for m in messages]

    def _assistant(self, message: Message) -> dict[str, Any]:
        turn: dict[str, Any] = {"role": "assistant", "content": message.content}
        traits = self.traits
        trace = reasoning_parts(message, traits.pair.opening, traits.pair.closing)
        if message.reasoning:
            if traits.field or not traits.inline:
                turn[traits.field or "reasoning_content"] = message.reasoning
            elif trace:
                turn["content"] = trace.opening + trace.body + trace.closing + trace.rest
        elif trace and trace.closing:
            foreign = trace.closing != traits.pair.closing
            quoted = trace.closing in trace.body or (trace.opening and trace.opening in trace.body)
            if traits.field and not trace.prefix.strip() and (foreign or quoted or not traits.inline):
                turn[traits.field] = trace.body.strip("\n")
                turn["content"] = trace.rest.lstrip("\n")
            elif not trace.opening:
                turn["content"] = f"{opening_of(trace.closing)}\n{message.content}"
        if message.tool_calls:
            turn["tool_calls"] = [_call(call) for call in message.tool_calls]
        return turn

    def verbatim(self, message: Message, prompt: str) -> str:
        """The assistant's text as it follows the generation prompt when the template does not write it.

        Args:
            message: an assistant turn.
            prompt: the rendered prompt before it. Where it opened the think block, the text's own opening
                marker is left out; where it did not and the text has a closing marker alone, an opening one
                is added.

        Returns:
            The text without an end token.

        Raises:
            TemplateMismatch: the answer would land inside the think block, or the turn calls tools.
        """
        if message.tool_calls:
            raise TemplateMismatch("a turn that was cut off cannot call tools: their form belongs to the chat template")
        traits = self.traits
        trace = reasoning_parts(message, traits.pair.opening, traits.pair.closing)
        opened = opened_marker(prompt)
        if opened is None:
            lead = traits.lead if not traits.lead.strip() else ""
            if trace is None:
                return lead + message.content
            opening = trace.opening or (opening_of(trace.closing) + "\n" if trace.closing else "")
            return lead + trace.prefix + opening + trace.body + trace.closing + trace.rest
        if trace is None or trace.prefix.strip():
            raise answer_inside(opened.opening)
        body = trace.body
        gap = prompt[prompt.rindex(opened.opening) + len(opened.opening) :]
        if gap and body.startswith(gap):
            body = body[len(gap) :]
        return body + (opened.closing if trace.closing else "") + trace.rest


def reasoning_parts(message: Message, opening: str, closing: str) -> TraceText | None:
    """Thoughts and answer of an assistant turn, wherever the record keeps them.

    Args:
        message: an assistant turn.
        opening: marker to write before thoughts that stand in a field.
        closing: marker to write after them.

    Returns:
        The five parts, or None for a turn without thoughts.
    """
    if not message.reasoning:
        parts = split_trace(message.content)
        if parts is None and message.truncated and message.trace and message.content == message.trace.text:
            return TraceText("", "", message.content, "", "", "open_only")  # cut before its closing marker
        return parts
    if message.truncated and not message.content:
        return TraceText("", opening, "\n" + message.reasoning.lstrip("\n"), "", "", "open_only")
    body = "\n" + message.reasoning.strip("\n") + "\n"
    return TraceText("", opening, body, closing, "\n\n" + message.content, "field")


def answer_inside(opening: str) -> TemplateMismatch:
    """The error for a turn without thoughts behind a prompt that has opened the think block.

    Args:
        opening: the marker that ends the prompt.
    """
    return TemplateMismatch(
        f"the prompt opens {opening} but the turn has no thoughts: its answer would be trained as one; use "
        "rows with thoughts, or a template setting without thinking"
    )


def opening_of(closing: str) -> str:
    """The opening marker that belongs to a closing one.

    Args:
        closing: a closing marker of the table.
    """
    return next(pair.opening for pair in MARKERS if pair.closing == closing)


def _other(message: Message) -> dict[str, Any]:
    turn: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.name is not None:
        turn["name"] = message.name
    if message.tool_call_id is not None:
        turn["tool_call_id"] = message.tool_call_id
    return turn


def _call(call: Mapping[str, Any]) -> dict[str, Any]:
    """A tool call with its arguments as an object: templates write objects, APIs keep them as JSON text."""
    function = dict(call.get("function", {}))
    if isinstance(function.get("arguments"), str):
        try:
            parsed = json.loads(function["arguments"])
        except json.JSONDecodeError:
            parsed = None
        if isinstance(parsed, dict):
            function["arguments"] = parsed
    return {**call, "function": function}
