"""The way back from conversations into the rows they were read from, and properties of both ways."""

import copy
import json
from dataclasses import replace

import pytest
from format_rows import ROWS
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_reason.data.conversation import Trace
from lit_reason.data.reading.formats import FORMATS, to_conversation, write_back
from lit_reason.data.reading.turns import ROLE_NAMES
from lit_reason.errors import RowError


def changed(conversation, content=None, reasoning=None):
    """The conversation with another text in its last message."""
    *before, last = conversation.messages
    last = replace(last, content=last.content if content is None else content)
    if reasoning is not None:
        trace = reasoning if isinstance(reasoning, Trace) else None
        last = replace(last, trace=trace, reasoning=trace.text if trace else reasoning)
    return replace(conversation, messages=(*before, last))


@pytest.mark.parametrize("name", ROWS)
def test_a_changed_text_goes_where_it_came_from(name):
    row = ROWS[name][0]
    kept = copy.deepcopy(row)
    conversation = changed(to_conversation(row, "r"), content="NEW TEXT")
    new = write_back(row, conversation)
    assert row == kept, "the row itself must not change"
    assert to_conversation(new, "r").messages == conversation.messages
    assert json.dumps(new).count("NEW TEXT") == 1
    assert list(new) == list(row)


def test_parts_stay_parts_and_keep_their_type():
    row = {
        "messages": [
            {
                "role": "assistant",
                "content": [{"type": "output_text", "text": "a"}, {"type": "output_text", "text": "b"}],
            }
        ]
    }
    new = write_back(row, changed(to_conversation(row, "r"), content="c"))
    assert new["messages"][0]["content"] == [{"type": "output_text", "text": "c"}]


def test_changed_reasoning_goes_to_its_field():
    row = {"prompt": "q", "completion": "a", "cot": "long"}
    conversation = to_conversation(row, "r")
    assert write_back(row, changed(conversation, reasoning="short")) == {**row, "cot": "short"}
    stripped = replace(conversation, messages=tuple(replace(m, reasoning=None) for m in conversation.messages))
    assert write_back(row, stripped) == {**row, "cot": ""}


def test_kept_thoughts_go_back_as_the_row_had_them():
    row = {"messages": [{"role": "assistant", "content": "a", "thinking": ["one", "two", "three ", "four"]}]}
    conversation = to_conversation(row, "r")
    full = conversation.messages[0].trace
    shorter = Trace((full.thoughts[0], full.thoughts[2]), (0, 2), 4)
    new = write_back(row, changed(conversation, reasoning=shorter))
    assert new["messages"][0]["thinking"] == ["one", "three "]
    # A thought that was rewritten (a bridge before it, say) goes back as it is now.
    bridged = Trace(("one\n\n", "... four"), (0, 3), 4)
    new = write_back(row, changed(conversation, reasoning=bridged))
    assert new["messages"][0]["thinking"] == ["one", "... four"]
    assert to_conversation(new, "r").messages[0].reasoning == bridged.text
    # A text that is no choice of the old thoughts is one thought.
    new = write_back(row, changed(conversation, reasoning="other"))
    assert new["messages"][0]["thinking"] == ["other"]
    bare = replace(conversation, messages=(replace(conversation.messages[0], reasoning=None, trace=None),))
    assert write_back(row, bare)["messages"][0]["thinking"] == []


# --- properties

texts = st.text(max_size=12)
said = st.text(min_size=1, max_size=12).filter(str.strip)
thoughts = st.one_of(texts, st.lists(texts, max_size=4))
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | texts
extra = st.dictionaries(st.sampled_from(["id", "source", "meta", "level"]), scalars, max_size=2)
parts = st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": said}), min_size=1, max_size=3)


@st.composite
def openai_turns(draw, last="assistant"):
    turn = st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user", "tool", "assistant"]), "content": said | parts},
        optional={"reasoning_content": thoughts, "name": texts, "weight": st.sampled_from([None, 1])},
    )
    end = st.fixed_dictionaries({"role": st.just(last), "content": said | parts}, optional={"thinking": thoughts})
    return [*draw(st.lists(turn, max_size=3)), draw(end)]


sharegpt_turn = st.fixed_dictionaries({"from": st.sampled_from(["human", "gpt", "observation"]), "value": said})
sharegpt_turns = st.lists(sharegpt_turn, max_size=3).map(lambda t: [*t, {"from": "gpt", "value": "end"}])
GOOD = {
    "messages": st.fixed_dictionaries({"messages": openai_turns()}, optional={"system": texts, "answer": texts}),
    "sharegpt": st.fixed_dictionaries({"conversations": sharegpt_turns}, optional={"system": texts}),
    "alpaca": st.fixed_dictionaries(
        {"instruction": texts, "output": said},
        optional={"input": texts, "thinking": thoughts, "history": st.lists(st.lists(said, min_size=2, max_size=2))},
    ),
    "openr1": st.fixed_dictionaries({"problem": texts, "generations": st.lists(said, min_size=1, max_size=3)}),
    "prompt_completion": st.fixed_dictionaries(
        {"prompt": texts | openai_turns(last="user"), "completion": said | openai_turns()},
        optional={"reasoning": thoughts, "answer": texts},
    ),
    "question_answer": st.fixed_dictionaries(
        {"question": texts, "answer": said | st.integers()}, optional={"cot": thoughts, "solution": said}
    ),
    "preference": st.fixed_dictionaries({"prompt": texts, "chosen": said | openai_turns(), "rejected": said}),
    "text": st.fixed_dictionaries({"text": said}),
}


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_write_back_undoes_reading(name, data):
    row = data.draw(GOOD[name])
    row = {**data.draw(extra), **row}
    conversation = to_conversation(row, "r", format=name, train_on=data.draw(st.sampled_from(["assistant", "last"])))
    assert write_back(row, conversation) == row
    for message in conversation.messages:
        assert not message.trained or message.role in ("assistant", "text")
        assert message.trace is None or message.trace.text == message.reasoning


json_values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3), max_leaves=12
)
turn_like = st.dictionaries(
    st.sampled_from(["role", "from", "content", "value", "tool_calls", "function_call", "weight", "thinking"]),
    st.sampled_from(list(ROLE_NAMES)) | json_values | parts,
    max_size=5,
)
known_fields = [
    *("messages", "conversations", "prompt", "completion", "instruction", "input", "output", "history", "system"),
    *("question", "problem", "solution", "answer", "generations", "correctness_llama", "chosen", "rejected"),
    *("text", "tools", "reasoning", "thought", "is_reasoning_complete"),
]
row_like = st.dictionaries(
    st.sampled_from(known_fields) | texts, json_values | st.lists(turn_like, max_size=3) | turn_like, max_size=6
)


@settings(max_examples=400, deadline=None)
@given(
    row=row_like,
    format=st.sampled_from(["auto", *FORMATS]),
    need=st.booleans(),
    train_on=st.sampled_from(["assistant", "last"]),
)
def test_any_object_is_read_or_refused_as_a_row(row, format, need, train_on):
    try:
        conversation = to_conversation(row, "r", format=format, need_assistant=need, train_on=train_on)
    except RowError as error:
        assert str(error)
        return
    assert conversation.messages
    assert all(isinstance(m.content, str) for m in conversation.messages)
    assert not need or any(m.trained for m in conversation.messages)
    assert write_back(row, conversation) == row
