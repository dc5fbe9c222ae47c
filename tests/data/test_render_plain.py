"""Rendering without a chat template: documents, and prompt and completion joined as they are."""

import pytest
from rendered_talks import reply, talk, trained_text
from tiny_tokenizer import build_tokenizer
from tokenizers import processors

from lit_reason.data.config import RenderConfig
from lit_reason.data.conversation import Conversation, Message
from lit_reason.data.rendering.render import Renderer
from lit_reason.data.token_row import Segment
from lit_reason.errors import UserError


@pytest.mark.parametrize("mode", ["auto", "chat"])
def test_a_conversation_without_a_template_is_refused(tokenizer_of, mode):
    with pytest.raises(UserError, match="no chat template: give one with lm.chat_template FILE"):
        Renderer(tokenizer_of(None), RenderConfig(mode=mode)).rows(talk("the colour? ", "the answer"))


def test_plain_mode_joins_prompt_and_completion(tokenizer_of):
    renderer = Renderer(tokenizer_of(None), RenderConfig(mode="plain"))
    assert renderer.mode == "plain"
    [row] = renderer.rows(talk("the colour? ", "the answer"))
    assert renderer.tokenizer.decode(row.ids.tolist()) == "the colour? the answer</s>"
    assert trained_text(renderer, row) == "the answer</s>"
    assert row.ids[: (row.weight == 0).sum()].tolist() == renderer.prompt(talk("the colour? ", "the answer"))


def test_plain_mode_begins_as_the_tokenizer_does(tokenizer_of):
    tokenizer = build_tokenizer()
    start = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", start)]
    )
    renderer = Renderer(tokenizer, RenderConfig(mode="plain"))
    [row] = renderer.rows(talk("the ", "end"))
    assert row.ids.tolist() == [
        *tokenizer("the ")["input_ids"],
        *tokenizer("end</s>", add_special_tokens=False)["input_ids"],
    ]
    [text] = renderer.rows(Conversation((Message("text", "the end", trained=True),), "f:1"))
    assert text.ids[0] == start and text.weight.tolist() == [0.0, *[1.0] * (len(text) - 1)]


def test_plain_document(renderer_of):
    """A text never goes through the template; all of it is trained but the first token."""
    renderer = renderer_of("chatml")
    [row] = renderer.rows(Conversation((Message("text", "the end of a turn", trained=True),), "f:1"))
    assert renderer.tokenizer.decode(row.ids.tolist()) == "the end of a turn<|im_end|>"
    assert row.weight.tolist() == [0.0, *[1.0] * (len(row) - 1)]
    assert row.segment.tolist() == [Segment.TEXT] * (len(row) - 1) + [Segment.END]


def test_plain_reasoning_field_stands_between_markers(tokenizer_of):
    message = Message("assistant", "red", reasoning="Let me think.", trained=True)
    renderer = Renderer(tokenizer_of(None), RenderConfig(mode="plain"))
    [row] = renderer.rows(reply(message))
    assert trained_text(renderer, row) == "<think>\nLet me think.\n</think>\n\nred</s>"
