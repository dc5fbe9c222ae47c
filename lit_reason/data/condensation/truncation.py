"""Keep the first share of a whole row and lose the rest, answer included (strategy `truncate`, arXiv
2512.21002)."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import replace

from lit_reason.data.condensation.selection import kept_count
from lit_reason.data.conversation import Conversation, Message, Trace


def truncate(conversation: Conversation, tau: float, count_tokens: Callable[[str], int]) -> Conversation | None:
    """The first `ceil(tau T)` of a conversation's T tokens, prompt included.

    The turn in which the cut falls is marked `truncated`, so that no end token is trained after it. A cut
    inside a turn that is not trained removes that turn; turns after the cut are gone.

    Args:
        conversation: traces already segmented.
        tau: share kept.
        count_tokens: length of a text in tokens.

    Returns:
        The shorter conversation, or None when nothing trained is left of it.
    """
    pieces = [
        (index, name, text)
        for index, message in enumerate(conversation.messages)
        for name, text in (("reasoning", message.reasoning), ("content", message.content))
        if text
    ]
    sizes = [count_tokens(text) for _, _, text in pieces]
    left = kept_count(sum(sizes), tau)
    for (index, name, text), size in zip(pieces, sizes, strict=True):
        if size > left:
            cut = _longest_prefix(text, left, count_tokens)
            return _cut_at(conversation, index, name, cut)
        left -= size
    return conversation


def _longest_prefix(text: str, tokens: int, count_tokens: Callable[[str], int]) -> int:
    """Characters of the longest prefix that is at most that many tokens long."""
    return bisect_right(range(len(text) + 1), tokens, key=lambda end: count_tokens(text[:end])) - 1


def _cut_at(conversation: Conversation, index: int, name: str, cut: int) -> Conversation | None:
    messages = list(conversation.messages[:index])
    last = conversation.messages[index]
    if last.trained and (cut > 0 or (name == "content" and last.reasoning)):
        messages.append(_cut_message(last, name, cut))
    while messages and not messages[-1].trained:
        messages.pop()
    return replace(conversation, messages=tuple(messages)) if messages else None


def _cut_message(message: Message, name: str, cut: int) -> Message:
    if name == "reasoning":
        trace = _clip(message.trace, cut)
        reasoning = (message.reasoning or "")[:cut]
        return replace(message, reasoning=reasoning, content="", tool_calls=(), trace=trace, truncated=True)
    trace = message.trace
    if trace is not None and message.reasoning is None:
        trace = _clip(trace, cut - message.content.find(trace.text))
    return replace(message, content=message.content[:cut], tool_calls=(), trace=trace, truncated=True)


def _clip(trace: Trace | None, length: int) -> Trace | None:
    """The first `length` characters of a trace; None when nothing is left of it."""
    if trace is None or length <= 0:
        return None
    thoughts: list[str] = []
    for thought in trace.thoughts:
        if length <= 0:
            break
        thoughts.append(thought[:length])
        length -= len(thought)
    return Trace(tuple(thoughts), trace.origin[: len(thoughts)], trace.total)
