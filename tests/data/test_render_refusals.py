"""What the renderer refuses: settings, templates, tokenizers and texts."""

import pytest
from rendered_talks import reply, talk, trained_text
from tiny_tokenizer import build_tokenizer

from lit_reason.data.config import RenderConfig
from lit_reason.data.conversation import Conversation, Message
from lit_reason.data.rendering.chat_template import TemplateMismatch
from lit_reason.data.rendering.render import Renderer
from lit_reason.errors import RowError, UserError


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"weights": {"solutoin": 1.0}}, "did you mean 'solution'"),
        ({"weights": {"prompt": 1.0}}, "the prompt is never trained"),
        ({"weights": {"end": -0.5}}, "finite number >= 0"),
        ({"weights": {"end": float("nan")}}, "finite number >= 0"),
        ({"weights": {"end": float("inf")}}, "finite number >= 0"),
        ({"mask_seam": 17}, "mask_seam is 17"),
        ({"mask_seam": -1}, "mask_seam is -1"),
    ],
)
def test_bad_settings(renderer_of, config, message):
    with pytest.raises(UserError, match=message):
        renderer_of("chatml", **config)


def test_chat_mode_needs_a_template(tokenizer_of):
    with pytest.raises(UserError, match="lm.chat_template FILE, or set render.mode=plain"):
        Renderer(tokenizer_of(None), RenderConfig(mode="chat"))


def test_template_with_a_syntax_error(tokenizer_of):
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}\n{{ m.content }"
    with pytest.raises(UserError, match="syntax error in line 2"):
        Renderer(tokenizer, RenderConfig())


def test_template_that_loses_the_words(tokenizer_of):
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}{{ eos_token }}{% endfor %}"
    with pytest.raises(UserError, match="loses the text of a turn"):
        Renderer(tokenizer, RenderConfig())


def test_no_end_token_at_all():
    tokenizer = build_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="never learn to stop"):
        Renderer(tokenizer, RenderConfig())


def test_template_without_end_token(renderer_of):
    with pytest.raises(TemplateMismatch, match="ends turns with no end token"):
        renderer_of("no_end").rows(talk("a", "red"))
    renderer = renderer_of("no_end", turn_text="verbatim")
    [row] = renderer.rows(talk("a", "red"))
    assert trained_text(renderer, row) == "red</s>"


@pytest.mark.parametrize("content", ["so <|im_end|> it is", "the end<|im_end|>"])
def test_written_end_token_is_refused(renderer_of, content):
    with pytest.raises(RowError, match="writes out the end token <|im_end|>"):
        renderer_of("chatml").rows(talk("a", content))
    thinking = Message("assistant", "red", reasoning=content, trained=True)
    with pytest.raises(RowError, match="writes out the end token"):
        renderer_of("chatml").rows(reply(thinking))


def test_written_end_token_in_a_prompt_is_not_our_business(renderer_of):
    renderer = renderer_of("chatml")
    [row] = renderer.rows(talk("what is <|im_end|>?", "red"))
    assert trained_text(renderer, row) == "red<|im_end|>"


def test_half_a_surrogate_pair(renderer_of):
    with pytest.raises(RowError, match=r"surrogate pair near '[^']*the \\ud83d end"):
        renderer_of("chatml").rows(talk("a", "the \ud83d end"))


def test_nothing_trained(renderer_of):
    with pytest.raises(RowError, match="no trained turn"):
        renderer_of("chatml").rows(talk("a", "b", trained=False))
    with pytest.raises(RowError, match="no token of this row is trained"):
        renderer_of("chatml", weights={"solution": 0, "end": 0}).rows(talk("a", "red"))
    with pytest.raises(RowError, match="has no prompt"):
        renderer_of("chatml").rows(Conversation((Message("assistant", "red", trained=True),), "f:1"))


def test_document_among_turns_is_refused(renderer_of):
    messages = (Message("text", "x", trained=True), *talk("a", "b").messages)
    with pytest.raises(RowError, match="plain document cannot stand"):
        renderer_of("chatml").rows(Conversation(messages, "f:1"))


def test_slow_tokenizer_is_refused():
    class Slow:
        is_fast = False

    with pytest.raises(UserError, match="Slow reports no character offsets"):
        Renderer(Slow(), RenderConfig())
