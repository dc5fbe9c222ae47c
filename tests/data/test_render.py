"""Rendering: masks against hand-built ones, and invariants over contents and templates."""

import pickle

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rendered_talks import GOOD, THINKING, THOUGHTS, reply, segments, talk, trained_text
from tiny_tokenizer import END_OF, build_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from lit_reason.data.condensation.thoughts import stage
from lit_reason.data.config import RenderConfig
from lit_reason.data.conversation import Conversation, Message, Trace
from lit_reason.data.rendering.render import Renderer
from lit_reason.data.token_row import Segment
from lit_reason.errors import RowError

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
        return  # refusals have tests of their own
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
