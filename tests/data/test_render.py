"""Rendering: masks against hand-built ones, invariants over contents and templates, and the refusals."""

import json
import pickle

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_tokenizer import END_OF, build_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from lit_reason.data.condensation.thoughts import stage
from lit_reason.data.config import RenderConfig
from lit_reason.data.conversation import Conversation, Message, Trace
from lit_reason.data.rendering.chat_template import TemplateMismatch
from lit_reason.data.rendering.render import Renderer
from lit_reason.data.token_row import Segment
from lit_reason.errors import RowError, UserError

GOOD = [name for name in END_OF if name not in ("drops_thoughts", "doubles_think")]
THOUGHTS = ("Let me think.\n\n", "Wait, 12 + 30 is 42.\n\n", "So it is.\n")
THINKING = f"<think>\n{''.join(THOUGHTS)}</think>\n\nThe answer is 42."


@pytest.fixture
def renderer_of(tokenizer_of):
    def get(template, *, kwargs=None, generation_eos=None, tokenizer=None, **config):
        eos = "<|im_end|>" if END_OF.get(template) == "<|im_end|>" else "</s>"
        tokenizer = tokenizer or tokenizer_of(template, eos=eos)
        return Renderer(tokenizer, RenderConfig(**config), template_kwargs=kwargs, generation_eos=generation_eos)

    return get


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


# --- masks built by hand ---


def test_chatml_row_equals_the_hand_built_one(renderer_of):
    """Ids and weights of a two-turn conversation, put together from strings piece by piece."""
    renderer = renderer_of("chatml")
    [row] = renderer.rows(talk("the colour?", "It is red.", "and then?", "the end"))
    parts = [
        ("<|im_start|>system\nYou help with plants.<|im_end|>\n<|im_start|>user\nthe colour?", 0),
        ("<|im_end|>\n<|im_start|>assistant\n", 0),
        ("It is red.<|im_end|>", 1),
        ("\n<|im_start|>user\nand then?<|im_end|>\n<|im_start|>assistant\n", 0),
        ("the end<|im_end|>", 1),
    ]
    ids, weight = [], []
    for text, trained in parts:
        piece = renderer.tokenizer(text, add_special_tokens=False)["input_ids"]
        ids += piece
        weight += [trained] * len(piece)
    assert row.ids.tolist() == ids
    assert row.weight.tolist() == weight
    assert row.row_id == "f:1"
    assert (row.ids.dtype, row.weight.dtype, row.segment.dtype, row.decile.dtype) == (
        np.int32,
        np.float32,
        np.uint8,
        np.int8,
    )


def test_parts_of_a_thinking_turn(renderer_of):
    """Markers, thoughts by stage, solution and end stand where the strings say; deciles are those of the
    trace.
    """
    trace = Trace(THOUGHTS[:1] + THOUGHTS[2:], origin=(0, 8), total=10)
    content = "<think>\n" + trace.text + "</think>\n\nThe answer is 42."
    message = Message(
        "assistant", content, trained=True, trace=Trace(("\n" + trace.thoughts[0], trace.thoughts[1]), (0, 8), 10)
    )
    renderer = renderer_of("chatml_generation", seam_tokens=2)
    [row] = renderer.rows(reply(message))
    names = [stage(0, 10).name, stage(8, 10).name]
    assert segments(renderer, row) == [
        ("PROMPT", "<|im_start|>user\nthe colour?<|im_end|>\n<|im_start|>assistant\n"),
        ("MARKER", "<think>\n"),
        (names[0], "Let me think.\n\n"),
        ("SEAM", "So "),
        (names[1], "it is."),
        ("MARKER", "\n</think>\n\n"),
        ("SOLUTION", "The answer is 42."),
        ("END", "<|im_end|>"),
    ]
    thinking = np.isin(row.segment, [stage(0, 10), stage(8, 10), Segment.SEAM])
    assert set(row.decile[row.segment == stage(0, 10)]) == {0}
    assert set(row.decile[thinking & (row.segment != stage(0, 10))]) == {8}
    assert set(row.decile[~thinking]) == {-1}
    assert trained_text(renderer, row) == content + "<|im_end|>"


def test_weights_and_masked_seam(renderer_of):
    trace = Trace(("\nLet me think.\n\n", "So it is.\n"), (0, 2), 3)
    message = Message("assistant", f"<think>{trace.text}</think>\n\nThe answer", trained=True, trace=trace)
    renderer = renderer_of(
        "chatml", seam_tokens=4, mask_seam=1, weights={"marker": 0.0, "solution": 2.5, "seam": 0.5, "end": 3}
    )
    [row] = renderer.rows(reply(message))
    by_name = {name: row.weight[row.segment == Segment[name]] for name in ("MARKER", "SOLUTION", "SEAM", "END")}
    assert set(by_name["MARKER"]) == {0.0}
    assert set(by_name["SOLUTION"]) == {2.5}
    assert by_name["SEAM"].tolist() == [0.0, 0.5, 0.5, 0.5]
    assert by_name["END"].tolist() == [3.0]
    assert set(row.weight[row.segment == Segment.PROMPT]) == {0.0}
    kept = row.weight[np.isin(row.segment, [stage(0, 3), stage(2, 3)])]
    assert len(kept) and set(kept) == {1.0}


def test_seam_ends_with_the_trace(renderer_of):
    """A tail shorter than seam_tokens does not turn marker and solution into seam."""
    trace = Trace(("\nLet me think.\n\n", "So.\n"), (0, 2), 3)
    message = Message("assistant", f"<think>{trace.text}</think>\n\nThe answer", trained=True, trace=trace)
    renderer = renderer_of("chatml", seam_tokens=16)
    [row] = renderer.rows(reply(message))
    assert [text for name, text in segments(renderer, row) if name == "SEAM"] == ["So."]
    assert segments(renderer, row)[-3:] == [
        ("MARKER", "\n</think>\n\n"),
        ("SOLUTION", "The answer"),
        ("END", "<|im_end|>"),
    ]


def test_only_cuts_are_seams(renderer_of):
    trace = Trace(("\nLet me think.\n\n", "Wait.\n\n", "So it is.\n"), (0, 1, 5), 6)
    message = Message("assistant", f"<think>{trace.text}</think>\n\nred", trained=True, trace=trace)
    renderer = renderer_of("chatml", seam_tokens=1)
    [row] = renderer.rows(reply(message))
    assert [text for name, text in segments(renderer, row) if name == "SEAM"] == ["So"]


def test_seam_inside_a_token_starts_with_that_token(renderer_of):
    trace = Trace(("\nthe ans", "wer is.\n"), (0, 2), 3)
    message = Message("assistant", f"<think>{trace.text}</think>\n\nred", trained=True, trace=trace)
    renderer = renderer_of("chatml", seam_tokens=1)
    [row] = renderer.rows(reply(message))
    assert [text for name, text in segments(renderer, row) if name == "SEAM"] == [" answer"]


def test_two_end_tokens_in_a_row(tokenizer_of):
    """Where a template ends a turn twice, the first one is what the model stops at; the second is left out."""
    tokenizer = build_tokenizer("chatml")
    tokenizer.chat_template = tokenizer.chat_template.replace("'<|im_end|>\\n'", "'<|im_end|></s>\\n'")
    renderer = Renderer(tokenizer, RenderConfig())
    [row] = renderer.rows(talk("a", "red", "b", "the end"))
    assert trained_text(renderer, row) == "red<|im_end|>the end<|im_end|>"
    assert renderer.tokenizer.decode(row.ids.tolist()).count("red<|im_end|></s>") == 1


def test_trimmed_offsets_give_the_same_row(tokenizer_of):
    """Tokenizers that leave blanks out of their offsets (GPT-2's) lead to the same row."""
    plain = build_tokenizer("chatml", eos="<|im_end|>")
    trimmed = build_tokenizer("chatml", eos="<|im_end|>")
    trimmed.backend_tokenizer.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=True)
    offsets = trimmed(" the end", return_offsets_mapping=True, add_special_tokens=False)["offset_mapping"]
    assert offsets[0][0] == 1  # the case this test is about
    trace = Trace(("\nLet me  think.\n\n", " So  it is.\n"), (0, 5), 6)
    message = Message("assistant", f"<think>{trace.text}</think>\n\n The answer", trained=True, trace=trace)
    rows = [Renderer(t, RenderConfig()).rows(reply(message))[0] for t in (plain, trimmed)]
    for field in ("ids", "weight", "segment", "decile"):
        assert getattr(rows[0], field).tolist() == getattr(rows[1], field).tolist(), field


# --- invariants ---

ALPHABET = st.sampled_from(
    [
        "a",
        "the ",
        "answer",
        " ",
        "\n",
        "\n\n",
        "\t",
        "é",
        "日本",
        "🙂",
        "\u2028",
        "\0",
        "<think>",
        "</think>",
        "<",
        "|>",
        "[/INST]",
        "{%",
        "{{",
    ]
)
CONTENTS = st.lists(ALPHABET, max_size=8).map("".join)


def conversations():
    return st.lists(st.tuples(CONTENTS, CONTENTS), min_size=1, max_size=3).map(
        lambda turns: talk(*(text for pair in turns for text in pair))
    )


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    conversation=conversations(),
    turn_text=st.sampled_from(["template", "verbatim"]),
    name=st.sampled_from(list(END_OF)),
)
def test_rows_hold_their_promises_for_any_content(renderer_of, conversation, turn_text, name):
    """Whatever the texts: rows begin with generation's prompt, train each turn once, and end each once."""
    renderer = renderer_of(name, turn_text=turn_text)
    try:
        rows = renderer.rows(conversation)
    except RowError:
        return  # refusals have tests of their own below
    turns = [i for i, m in enumerate(conversation.messages) if m.trained]
    groups = [(rows[0], turns)] if len(rows) == 1 else [(row, [k]) for row, k in zip(rows, turns, strict=True)]
    for row, expected in groups:
        assert row.weight[0] == 0
        ends = np.flatnonzero(row.segment == Segment.END)
        assert len(ends) == len(expected)
        assert set(row.ids[ends]) <= set(renderer.stop_ids)
        assert ends[-1] == len(row) - 1
        assert np.isin(row.ids[row.weight > 0], renderer.stop_ids).sum() == len(expected)
        begin = 0
        for k, end in zip(expected, ends, strict=True):
            prompt = renderer.prompt_before(conversation, k)
            assert row.ids[: len(prompt)].tolist() == prompt
            assert not row.weight[begin : len(prompt)].any()
            assert row.weight[len(prompt) : end + 1].all()
            text = renderer.tokenizer.decode(row.ids[len(prompt) : end].tolist())
            words = conversation.messages[k].content.replace("<think>", "").replace("</think>", "")
            assert "".join(words.split()) == "".join(text.replace("<think>", "").replace("</think>", "").split())
            begin = end + 1


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=CONTENTS, name=st.sampled_from(["chatml", "chatml_generation"]))
def test_verbatim_content_is_trained_byte_for_byte(renderer_of, content, name):
    """A template that writes contents as they are trains exactly the content and the end token."""
    if "</think>" in content:
        content = "<think>" + content
    renderer = renderer_of(name)
    [row] = renderer.rows(talk("the end", content))
    assert trained_text(renderer, row) == content + "<|im_end|>"


@pytest.mark.parametrize("name", GOOD)
def test_prompt_is_a_prefix_and_stops_before_the_answer(renderer_of, name):
    renderer = renderer_of(name)
    conversation = talk("the colour?", "It is red.")
    [row] = renderer.rows(conversation)
    prompt = renderer.prompt(conversation)
    open_ended = renderer.prompt(Conversation(conversation.messages[:1], "f:1"))
    assert prompt == open_ended == row.ids[: len(prompt)].tolist()
    assert row.segment[len(prompt)] != Segment.PROMPT and not row.weight[: len(prompt)].any()
    assert trained_text(renderer, row).strip().endswith("It is red." + END_OF[name])


# --- several turns ---


def test_history_kept_gives_one_row(renderer_of):
    renderer = renderer_of("chatml")
    [row] = renderer.rows(talk("a", THINKING, "b", THINKING))
    assert (row.segment == Segment.END).sum() == 2


def test_history_rewritten_gives_a_row_per_trained_turn(renderer_of):
    """The template drops old thoughts: each turn is trained behind the history that generation will see."""
    renderer = renderer_of("hybrid_thinking")
    rows = renderer.rows(talk("a", THINKING, "b", THINKING))
    assert [row.row_id for row in rows] == ["f:1#1", "f:1#2"]
    texts = [renderer.tokenizer.decode(row.ids.tolist()) for row in rows]
    assert texts[0].count("Let me think.") == 1 and texts[1].count("Let me think.") == 1
    assert texts[1].startswith("<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nThe answer is 42.<|im_end|>")
    assert [trained_text(renderer, row) for row in rows] == [THINKING + "<|im_end|>"] * 2


def test_untrained_turns_are_prompt(renderer_of):
    renderer = renderer_of("chatml")
    messages = (*talk("a", "first", trained=False).messages, *talk("b", "second").messages)
    [row] = renderer.rows(Conversation(messages, "f:1"))
    assert trained_text(renderer, row) == "second<|im_end|>"


def test_train_on_last(renderer_of):
    renderer = renderer_of("chatml", train_on="last")
    [row] = renderer.rows(talk("a", "first", "b", "second"))
    assert trained_text(renderer, row) == "second<|im_end|>"


def test_row_ends_with_the_last_trained_turn(renderer_of):
    renderer = renderer_of("chatml")
    messages = (*talk("a", "first").messages, Message("user", "never answered"))
    [row] = renderer.rows(Conversation(messages, "f:1"))
    assert renderer.tokenizer.decode(row.ids.tolist()).endswith("first<|im_end|>")


# --- tools ---

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


# --- thoughts, wherever the record and the template keep them ---


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


def test_turn_cut_off_cannot_call_tools(renderer_of):
    message = Message("assistant", "the ans", tool_calls=(CALL,), trained=True, truncated=True)
    with pytest.raises(TemplateMismatch, match="cut off cannot call tools"):
        renderer_of("hybrid_thinking").rows(reply(message))


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


# --- borders between prompt and answer ---


def test_token_across_the_border_is_cut_there(renderer_of):
    """An answer that begins with a newline would melt into the newline that ends the prompt."""
    renderer = renderer_of("chatml")
    conversation = talk("the colour?", "\n\nIt is red.")
    prompt = renderer.prompt(conversation)
    [row] = renderer.rows(conversation)
    text = renderer.tokenizer.decode(row.ids.tolist())
    whole = renderer.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert whole[: len(prompt)] != prompt  # the case this test is about
    assert row.ids[: len(prompt)].tolist() == prompt
    assert trained_text(renderer, row) == "\n\nIt is red.<|im_end|>"


def test_border_that_moves_with_the_next_character(renderer_of):
    """No token crosses the border, and still the prompt alone has other tokens than within the text."""
    renderer = renderer_of("headers")
    conversation = talk("the colour?", "It is red.", "again", "red")
    rows = renderer.rows(conversation)
    assert len(rows) == 2  # one text would not begin with generation's prompt at both turns
    for k, row in zip((1, 3), rows, strict=True):
        prompt = renderer.prompt_before(conversation, k)
        assert row.ids[: len(prompt)].tolist() == prompt


def test_tokenizer_that_puts_blanks_before_texts(tokenizer_of):
    """A SentencePiece-like tokenizer must not put a blank before the answer when it is encoded apart."""
    vocab = {
        c: i
        for i, c in enumerate(["<unk>", "<s>", "</s>", *"▁abcdefghijklmnopqrstuvwxyz[]/INST?.", "<0x0A>", "\n\n", "\n"])
    }
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[("\n", "\n")], unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '[INST]' ~ m.content ~ '\n' if m.role == 'user' else "
        "m.content ~ eos_token }}{% endfor %}"
    )
    renderer = Renderer(tokenizer, RenderConfig())
    conversation = talk("a?", "\nred")
    [row] = renderer.rows(conversation)
    prompt = renderer.prompt(conversation)
    tokens = tokenizer.convert_ids_to_tokens(row.ids.tolist())
    assert tokens[: len(prompt)][-1] == "\n"
    assert tokens[len(prompt) :] == ["\n", "r", "e", "d", "</s>"]

    piece = renderer.encoder.encode_piece("\nred")
    assert piece.start.tolist() == [0, 1, 2, 3] and piece.end.tolist() == [1, 2, 3, 4]


def test_unknown_word_across_the_border_is_cut_there():
    """Prompt alone and whole text have the same ids here, and still the token belongs to both sides."""
    backend = Tokenizer(models.WordLevel({"<end>": 0, "<unk>": 1, "two": 2}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", unk_token="<unk>")
    [row] = Renderer(tokenizer, RenderConfig(mode="plain")).rows(talk("fo", "o two"))
    assert row.ids.tolist() == [1, 1, 2, 0]
    assert row.weight.tolist() == [0, 1, 1, 1]


# --- plain texts ---


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


# --- refusals ---


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


# --- small facts ---


def test_toy_vocabulary(renderer_of):
    """A word tokenizer that knows nothing but its own language renders that language."""
    words = ["<end>", "one", "two", "plus", "three"]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")
    renderer = Renderer(tokenizer, RenderConfig(mode="plain"))
    [row] = renderer.rows(talk("one plus two ", "three"))
    assert tokenizer.convert_ids_to_tokens(row.ids.tolist()) == ["one", "plus", "two", "three", "<end>"]
    assert row.weight.tolist() == [0, 0, 0, 1, 1]
    with pytest.raises(RowError, match="the tokenizer cannot encode this text"):
        renderer.rows(talk("one plus four ", "three"))


def test_stop_ids_of_all_sources(renderer_of):
    renderer = renderer_of("model_role", generation_eos=[2, 3])
    assert renderer.tokenizer.convert_ids_to_tokens(list(renderer.stop_ids)) == ["</s>", "<s>", "<end_of_turn>"]


def test_padding_token_is_no_end_token():
    assert Renderer(build_tokenizer("chatml", eos="<|im_end|>"), RenderConfig()).pad_id == 1
    same = build_tokenizer("chatml", eos="<|im_end|>", pad="<|im_end|>")
    assert same.convert_ids_to_tokens(Renderer(same, RenderConfig()).pad_id) == "<unk>"
    none = build_tokenizer("chatml", eos="<|im_end|>", pad="<|im_end|>")
    none.unk_token = None
    assert none.convert_ids_to_tokens(Renderer(none, RenderConfig()).pad_id) == "<pad>"


def test_padding_state_of_the_tokenizer_does_no_harm(renderer_of):
    """Generation pads and cuts through the same tokenizer object."""
    renderer = renderer_of("chatml", tokenizer=build_tokenizer("chatml", eos="<|im_end|>"))
    before = renderer.rows(talk("a", "red"))[0].ids.tolist()
    renderer.tokenizer(["a", "the end of a turn"], truncation=True, max_length=2)
    assert renderer.rows(talk("a", "red"))[0].ids.tolist() == before
    renderer.tokenizer(["a", "the end of a turn"], padding="max_length", max_length=64)
    assert renderer.rows(talk("a", "red"))[0].ids.tolist() == before


def test_fingerprint_follows_what_decides_rows(renderer_of):
    first = renderer_of("hybrid_thinking").fingerprint()
    assert renderer_of("hybrid_thinking").fingerprint() == first
    others = {
        renderer_of("opens_think").fingerprint(),
        renderer_of("hybrid_thinking", mask_seam=1).fingerprint(),
        renderer_of("hybrid_thinking", kwargs={"enable_thinking": False}).fingerprint(),
        renderer_of("hybrid_thinking", generation_eos=[2]).fingerprint(),
    }
    assert first not in others and len(others) == 4


def test_renderer_survives_pickling(renderer_of):
    renderer = renderer_of("chatml")
    again = pickle.loads(pickle.dumps(renderer))
    assert again.rows(talk("a", "red"))[0].ids.tolist() == renderer.rows(talk("a", "red"))[0].ids.tolist()
