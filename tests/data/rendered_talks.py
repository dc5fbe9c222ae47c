"""Conversations for the tests of rendering, and what their rows say."""

from tiny_tokenizer import END_OF

from lit_reason.data.conversation import Conversation, Message
from lit_reason.data.token_row import Segment

GOOD = [name for name in END_OF if name not in ("drops_thoughts", "doubles_think")]
THOUGHTS = ("Let me think.\n\n", "Wait, 12 + 30 is 42.\n\n", "So it is.\n")
THINKING = f"<think>\n{''.join(THOUGHTS)}</think>\n\nThe answer is 42."


def talk(*contents, trained=True, row_id="f:1", **fields):
    """User and assistant in turn, the assistant trained."""
    messages = tuple(
        Message("assistant", c, trained=trained) if i % 2 else Message("user", c) for i, c in enumerate(contents)
    )
    return Conversation(messages, row_id, **fields)


def reply(message, *before, **fields):
    return Conversation((*(before or (Message("user", "the colour?"),)), message), "f:1", **fields)


def segments(renderer, row):
    """The row as (segment name, decoded text) runs."""
    runs = []
    for i, segment in zip(row.ids.tolist(), row.segment.tolist(), strict=True):
        if runs and runs[-1][0] == segment:
            runs[-1][1].append(i)
        else:
            runs.append((segment, [i]))
    return [(Segment(s).name, renderer.tokenizer.decode(ids)) for s, ids in runs]


def trained_text(renderer, row):
    return renderer.tokenizer.decode(row.ids[row.weight > 0].tolist())
