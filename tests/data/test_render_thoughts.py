"""Rendering of thoughts, wherever the record and the template keep them."""

import numpy as np
import pytest
from rendered_talks import GOOD, THINKING, reply, segments, talk, trained_text
from tiny_tokenizer import END_OF, build_tokenizer

from lit_reason.data.condensation.thoughts import stage
from lit_reason.data.config import RenderConfig
from lit_reason.data.conversation import Conversation, Message, Trace
from lit_reason.data.rendering.chat_template import TemplateMismatch
from lit_reason.data.rendering.render import Renderer
from lit_reason.errors import RowError


@pytest.mark.parametrize("name", [*GOOD])
def test_reasoning_field_is_always_written(renderer_of, name):
    """Templates that read the field get it; for the others it goes into the content, between markers."""
    message = Message("assistant", "The answer is 42.", reasoning="Let me think.", trained=True)
    renderer = renderer_of(name)
    [row] = renderer.rows(reply(message))
    text = renderer.tokenizer.decode(row.ids.tolist())
    assert text.endswith("<think>\nLet me think.\n</think>\n\nThe answer is 42." + END_OF[name])
    assert row.weight[row.segment == stage(0, 1)].all() and (row.segment == stage(0, 1)).any()


def test_field_written_behind_the_answer_is_not_used(tokenizer_of):
    """A template that puts the thoughts after the answer is no use; they go into the content instead."""
    tokenizer = build_tokenizer("chatml", eos="<|im_end|>")
    behind = "~ turn.content ~ ('<think>' ~ turn.reasoning_content ~ '</think>' if turn.reasoning_content else '')"
    tokenizer.chat_template = tokenizer.chat_template.replace("~ turn.content", behind)
    renderer = Renderer(tokenizer, RenderConfig())
    message = Message("assistant", "The answer is 42.", reasoning="Let me think.", trained=True)
    [row] = renderer.rows(reply(message))
    expected = "<think>\nLet me think.\n</think>\n\nThe answer is 42.<|im_end|>"
    assert trained_text(renderer, row) == expected


def test_opening_in_the_prompt_is_not_trained(renderer_of):
    renderer = renderer_of("opens_think")
    [row] = renderer.rows(talk("the colour?", THINKING))
    runs = segments(renderer, row)
    assert runs[0][1].endswith("<|im_start|>assistant\n<think>\n")
    assert trained_text(renderer, row) == THINKING.removeprefix("<think>\n") + "<|im_end|>"


@pytest.mark.parametrize("name", ["chatml", "hybrid_thinking", "opens_think", "model_role"])
def test_lone_closing_marker_gets_its_opening_once(renderer_of, name):
    renderer = renderer_of(name)
    [row] = renderer.rows(talk("the colour?", THINKING.removeprefix("<think>\n")))
    assert renderer.tokenizer.decode(row.ids.tolist()).count("<think>") == 1


def test_foreign_markers_become_the_models_own(renderer_of):
    """Data written with other markers: a template that takes thoughts in a field writes its own around
    them.
    """
    foreign = THINKING.replace("think>", "reasoning>")
    renderer = renderer_of("hybrid_thinking")
    [row] = renderer.rows(talk("the colour?", foreign))
    assert trained_text(renderer, row) == THINKING + "<|im_end|>"
    [kept] = renderer_of("chatml").rows(talk("the colour?", foreign))
    assert trained_text(renderer, kept) == foreign + "<|im_end|>"


def test_quoted_marker_survives(renderer_of):
    quoting = "<think>\nThe tag </think> closes it.\n</think>\n\nThe answer is 42."
    renderer = renderer_of("hybrid_thinking")
    [row] = renderer.rows(talk("the colour?", quoting))
    assert trained_text(renderer, row) == quoting + "<|im_end|>"


def test_dropped_thoughts_are_refused_and_verbatim_helps(renderer_of):
    conversation = talk("the colour?", THINKING, "again", THINKING)
    with pytest.raises(TemplateMismatch, match="render.turn_text=verbatim"):
        renderer_of("drops_thoughts").rows(conversation)
    renderer = renderer_of("drops_thoughts", turn_text="verbatim")
    rows = renderer.rows(conversation)
    assert [trained_text(renderer, r) for r in rows] == [THINKING.removeprefix("<think>\n") + "</s>"] * 2
    assert renderer.tokenizer.decode(rows[1].ids.tolist()).count("<think>") == 1


def test_doubled_block_is_refused_and_verbatim_helps(renderer_of):
    with pytest.raises(TemplateMismatch, match="doubles the think block"):
        renderer_of("doubles_think").rows(talk("the colour?", THINKING))
    renderer = renderer_of("doubles_think", turn_text="verbatim")
    [row] = renderer.rows(talk("the colour?", THINKING))
    assert trained_text(renderer, row) == THINKING + "<|im_end|>"


@pytest.fixture
def raw_in_open_block():
    """A generation prompt that opens the block, before contents that are written as they are."""
    tokenizer = build_tokenizer("chatml", eos="<|im_end|>")
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ '<think>\n' if m.role == 'assistant' }}"
        "{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
    )
    return Renderer(tokenizer, RenderConfig())


def test_block_opened_by_prompt_and_text_is_refused(raw_in_open_block):
    with pytest.raises(TemplateMismatch, match="doubles the think block: it is opened 2 times"):
        raw_in_open_block.rows(talk("the colour?", THINKING))
    with pytest.raises(TemplateMismatch, match="doubles the think block: it is opened 2 times"):
        raw_in_open_block.rows(talk("the colour?", "<think>\n\n</think>\n\nred"))


def test_answer_in_a_block_that_nothing_closes_is_refused(raw_in_open_block):
    with pytest.raises(TemplateMismatch, match="opens <think> but the turn has no thoughts"):
        raw_in_open_block.rows(talk("the colour?", "red"))


def test_rewritten_answer_is_refused(tokenizer_of):
    tokenizer = build_tokenizer("chatml", eos="<|im_end|>")
    tokenizer.chat_template = tokenizer.chat_template.replace("~ turn.content", "~ turn.content.replace('4', '5')")
    renderer = Renderer(tokenizer, RenderConfig())
    assert renderer.rows(talk("the colour?", "red"))
    with pytest.raises(TemplateMismatch, match="rewrites the end of a turn: it ends '52' instead of '42'"):
        renderer.rows(talk("the colour?", "42"))
    with pytest.raises(TemplateMismatch, match="does not write the thoughts of a turn: .*12 . 30 is 42"):
        renderer.rows(talk("the colour?", THINKING.replace("answer is 42", "answer is it")))


def test_answer_without_thoughts_is_not_put_into_an_open_block(renderer_of):
    with pytest.raises(TemplateMismatch, match="opens <think> but the turn has no thoughts"):
        renderer_of("drops_thoughts", turn_text="verbatim").rows(talk("the colour?", "red"))


def test_template_setting_without_thinking(renderer_of):
    renderer = renderer_of("hybrid_thinking", kwargs={"enable_thinking": False})
    [row] = renderer.rows(talk("the colour?", "red"))
    assert segments(renderer, row)[0][1].endswith("<think>\n\n</think>\n\n")
    assert trained_text(renderer, row) == "red<|im_end|>"


def test_verbatim_keeps_the_blank_before_the_answer(renderer_of):
    rows = [renderer_of("inst", turn_text=t).rows(talk("a", "red"))[0] for t in ("template", "verbatim")]
    assert rows[0].ids.tolist() == rows[1].ids.tolist()


@pytest.mark.parametrize("name", ["chatml", "hybrid_thinking", "opens_think", "drops_thoughts"])
def test_truncated_text_has_no_end_token(renderer_of, name):
    trace = Trace(("\nLet me think.\n\n", "Wait, 12"), (0, 1), 4)
    message = Message("assistant", "<think>" + trace.text, trained=True, trace=trace, truncated=True)
    renderer = renderer_of(name)
    [row] = renderer.rows(reply(message))
    assert not np.isin(row.ids[row.weight > 0], renderer.stop_ids).any()
    assert renderer.tokenizer.decode(row.ids.tolist()).endswith("<think>\nLet me think.\n\nWait, 12")
    field = Message("assistant", "", reasoning=trace.text[1:], trained=True, truncated=True)
    assert renderer.rows(reply(field))[0].ids.tolist() == row.ids.tolist()


def test_turn_cut_off_in_mid_conversation_ends_its_row(renderer_of):
    """The turn behind it is trained with the history closed, in a row of its own."""
    first = Message("assistant", "the ans", trained=True, truncated=True)
    later = talk("again", "red").messages
    renderer = renderer_of("chatml")
    rows = renderer.rows(Conversation((Message("user", "the colour?"), first, *later), "f:1"))
    assert [trained_text(renderer, row) for row in rows] == ["the ans", "red<|im_end|>"]


def test_thoughts_cut_before_their_closing_marker(renderer_of):
    """A text whose opening marker was in the prompt is nothing but thoughts once its end is cut off."""
    trace = Trace(("Let me think.\n\n", "Wait, 12"), (0, 1), 4)
    message = Message("assistant", trace.text, trained=True, trace=trace, truncated=True)
    renderer = renderer_of("opens_think")
    [row] = renderer.rows(reply(message))
    assert trained_text(renderer, row) == trace.text
    assert set(row.segment[row.weight > 0]) == {stage(0, 4), stage(1, 4)}
    assert trained_text(renderer, renderer_of("chatml").rows(reply(message))[0]) == trace.text


def test_trace_without_markers(renderer_of):
    """`on_missing: whole` gives a trace that no marker surrounds."""
    trace = Trace(("Let me think.\n\n", "Wait.\n\n"), (0, 3), 4)
    message = Message("assistant", trace.text + "The answer is 42.", trained=True, trace=trace)
    renderer = renderer_of("chatml", seam_tokens=0)
    [row] = renderer.rows(reply(message))
    assert segments(renderer, row)[1:] == [
        (stage(0, 4).name, "Let me think.\n\n"),
        (stage(3, 4).name, "Wait."),
        ("SOLUTION", "\n\nThe answer is 42."),
        ("END", "<|im_end|>"),
    ]


def test_trace_that_is_not_in_the_text_is_refused(renderer_of):
    message = Message("assistant", THINKING, trained=True, trace=Trace(("something else",), (0,), 1))
    with pytest.raises(RowError, match="trace is not the text between"):
        renderer_of("chatml").rows(reply(message))
