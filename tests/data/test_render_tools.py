"""Rendering of tool calls and their results."""

import json

import pytest
from rendered_talks import reply, segments, talk, trained_text

from lit_reason.data.condensation.thoughts import stage
from lit_reason.data.conversation import Conversation, Message
from lit_reason.data.rendering.chat_template import TemplateMismatch
from lit_reason.errors import RowError

CALL = {"type": "function", "function": {"name": "add", "arguments": json.dumps({"a": 12, "b": 30})}}
TOOLS = ({"type": "function", "function": {"name": "add", "description": "adds", "parameters": {}}},)


def tool_talk(content=""):
    return Conversation(
        (
            Message("user", "the colour?"),
            Message("assistant", content, tool_calls=(CALL,), trained=True),
            Message("tool", "42", name="add", tool_call_id="x"),
            Message("assistant", "The answer is 42.", trained=True),
        ),
        "f:1",
        TOOLS,
    )


def test_tool_calls_are_trained_and_results_are_not(renderer_of):
    renderer = renderer_of("hybrid_thinking")
    rows = renderer.rows(tool_talk("Let me see."))
    call = '<tool_call>\n{"name": "add", "arguments": {"a": 12, "b": 30}}\n</tool_call>'
    assert segments(renderer, rows[0])[1:] == [
        ("MARKER", "<think>\n\n</think>\n\n"),
        ("SOLUTION", "Let me see."),
        ("TOOL_CALL", "\n" + call),
        ("END", "<|im_end|>"),
    ]
    prompt = segments(renderer, rows[-1])[0]
    assert prompt[0] == "PROMPT" and "<tool_response>\n42\n</tool_response>" in prompt[1]
    assert "Functions on offer" in prompt[1] and call in prompt[1]


def test_thoughts_before_a_tool_call(renderer_of):
    renderer = renderer_of("hybrid_thinking")
    conversation = tool_talk("<think>\nLet me see.\n</think>\n\n")
    [row] = renderer.rows(conversation)  # thoughts stay while no new question was asked: one row serves both
    assert [name for name, _ in segments(renderer, row)][:6] == [
        "PROMPT",
        "MARKER",
        stage(0, 1).name,
        "MARKER",
        "TOOL_CALL",
        "END",
    ]
    assert segments(renderer, row)[4][1].startswith("<tool_call>")


def test_other_end_token_after_a_tool_call(renderer_of):
    """A template may end a turn of calls with a token of its own; generation has to stop there too."""
    renderer = renderer_of("headers")
    stops = renderer.tokenizer.convert_ids_to_tokens(list(renderer.stop_ids))
    assert set(stops) == {"</s>", "<|eot_id|>", "<|eom_id|>"}
    rows = renderer.rows(tool_talk())
    assert trained_text(renderer, rows[0]) == '{"name": "add", "parameters": {"a": 12, "b": 30}}<|eom_id|>'


def test_tool_calls_that_the_template_drops_are_refused(renderer_of):
    with pytest.raises(TemplateMismatch, match="does not write tool calls: 'add'"):
        renderer_of("chatml").rows(tool_talk())


def test_text_that_the_template_drops_beside_a_call_is_refused(renderer_of):
    with pytest.raises(TemplateMismatch, match="text beside the tool call.*Let me see"):
        renderer_of("headers").rows(tool_talk("Let me see."))


def test_template_message_reaches_the_user(renderer_of):
    two = Message("assistant", "", tool_calls=(CALL, CALL), trained=True)
    with pytest.raises(RowError, match="only one call per turn"):
        renderer_of("headers").rows(reply(two, tools=TOOLS))
    system = Conversation((Message("system", "x"), *talk("a", "b").messages), "f:1")
    with pytest.raises(RowError, match="a system turn is not supported"):
        renderer_of("inst").rows(system)


def test_turn_cut_off_cannot_call_tools(renderer_of):
    message = Message("assistant", "the ans", tool_calls=(CALL,), trained=True, truncated=True)
    with pytest.raises(TemplateMismatch, match="cut off cannot call tools"):
        renderer_of("hybrid_thinking").rows(reply(message))
