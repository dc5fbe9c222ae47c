"""Adapters: what each format reads as, what is refused and why, and the way back into the row."""

import copy
import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_reason.data.conversation import Trace
from lit_reason.data.reading.formats import FORMATS, detect_format, to_conversation, write_back
from lit_reason.data.reading.turns import REASONING_KEYS, ROLE_NAMES
from lit_reason.errors import RowError, UserError


def turns(row, **options):
    """Role, content and whether it is trained, of each message."""
    return [(m.role, m.content, m.trained) for m in to_conversation(row, "r:1", **options).messages]


CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
SCHEMA = {"name": "add", "description": "adds", "parameters": {"type": "object"}}

# One row a format: (row, detected format, messages, answer, metadata fields).
ROWS = {
    "messages": (
        {
            "messages": [
                {"role": "developer", "content": "Be kind."},
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": "Hello"},
            ],
            "source": "x",
        },
        "messages",
        [("system", "Be kind.", False), ("user", "Hi", False), ("assistant", "Hello", True)],
        None,
        {"source"},
    ),
    "conversations of role and content": (
        {"conversations": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]},
        "messages",
        [("user", "Hi", False), ("assistant", "Hello", True)],
        None,
        set(),
    ),
    "text parts": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "c"}]},
            ],
            "answer": "7",
        },
        "messages",
        [("user", "ab", False), ("assistant", "c", True)],
        "7",
        set(),
    ),
    "sharegpt": (
        {
            "system": "Be kind.",
            "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}],
            "id": 3,
        },
        "sharegpt",
        [("system", "Be kind.", False), ("user", "Hi", False), ("assistant", "Hello", True)],
        None,
        {"id"},
    ),
    "alpaca": (
        {"instruction": "Add.", "input": "1 2", "output": "3", "history": [["q", "a"]], "system": ""},
        "alpaca",
        [("user", "q", False), ("assistant", "a", True), ("user", "Add.\n1 2", False), ("assistant", "3", True)],
        None,
        set(),
    ),
    "prompt and completion": (
        {"prompt": "2+2=", "completion": " 4", "answer": 4, "completion_2": "x"},
        "prompt_completion",
        [("user", "2+2=", False), ("assistant", " 4", True)],
        "4",
        {"completion_2"},
    ),
    "prompt and completion of turns": (
        {
            "prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}],
            "completion": [{"role": "assistant", "content": "a"}],
        },
        "prompt_completion",
        [("system", "s", False), ("user", "u", False), ("assistant", "a", True)],
        None,
        set(),
    ),
    "input and output": (
        {"id": "1", "input": "begin", "output": "end", "task": "T"},
        "prompt_completion",
        [("user", "begin", False), ("assistant", "end", True)],
        None,
        {"id", "task"},
    ),
    "gsm8k": (
        {"question": "How many?", "answer": "40+32 = <<40+32=72>>72\n#### 1,072 "},
        "question_answer",
        [("user", "How many?", False), ("assistant", "40+32 = <<40+32=72>>72\n#### 1,072 ", True)],
        "1,072",
        set(),
    ),
    "math": (
        {"problem": "p", "solution": "so \\boxed{3}", "answer": "3", "level": 2},
        "question_answer",
        [("user", "p", False), ("assistant", "so \\boxed{3}", True)],
        "3",
        {"level"},
    ),
    "question with a model's reasoning": (
        {"question": "q", "model_reasoning": "hm", "model_answer": "It is 3.", "reference_answer": "3"},
        "question_answer",
        [("user", "q", False), ("assistant", "It is 3.", True)],
        "3",
        set(),
    ),
    "openr1": (
        {
            "problem": "p",
            "generations": ["wrong", "cut", "<think>t</think>right"],
            "correctness_math_verify": [False, True, True],
            "is_reasoning_complete": [True, False, True],
            "solution": "human",
            "answer": "5",
        },
        "openr1",
        [("user", "p", False), ("assistant", "<think>t</think>right", True)],
        "5",
        {"correctness_math_verify", "is_reasoning_complete", "solution"},
    ),
    "openr1 with messages": (
        {
            "problem": "p",
            "generations": ["g"],
            "messages": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "m"}],
            "answer": "5",
        },
        "messages",
        [("user", "p", False), ("assistant", "m", True)],
        "5",
        {"problem", "generations"},
    ),
    "preference of one turn": (
        {
            "conversations": [
                {"from": "human", "value": "a"},
                {"from": "gpt", "value": "b"},
                {"from": "human", "value": "c"},
            ],
            "chosen": {"from": "gpt", "value": "good"},
            "rejected": {"from": "gpt", "value": "bad"},
        },
        "preference",
        [("user", "a", False), ("assistant", "b", False), ("user", "c", False), ("assistant", "good", True)],
        None,
        {"rejected"},
    ),
    "preference of texts": (
        {"prompt": "p", "chosen": "good", "rejected": "bad"},
        "preference",
        [("user", "p", False), ("assistant", "good", True)],
        None,
        {"rejected"},
    ),
    "preference of a question": (
        {"question": "p", "chosen": "good", "rejected": "bad"},
        "preference",
        [("user", "p", False), ("assistant", "good", True)],
        None,
        {"rejected"},
    ),
    "preference of conversations": (
        {
            "prompt": "p",
            "chosen": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "good"}],
            "rejected": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "bad"}],
        },
        "preference",
        [("user", "p", False), ("assistant", "good", True)],
        None,
        {"prompt", "rejected"},
    ),
    "preference after an instruction": (
        {"instruction": "i", "input": "", "chosen": [{"role": "assistant", "content": "good"}], "rejected": []},
        "preference",
        [("user", "i", False), ("assistant", "good", True)],
        None,
        {"rejected"},
    ),
    "text": ({"text": "A document.", "url": "u"}, "text", [("text", "A document.", True)], None, {"url"}),
}


@pytest.mark.parametrize("name", ROWS)
def test_each_format_reads_as_expected(name):
    row, kind, expected, answer, metadata = ROWS[name]
    kept = copy.deepcopy(row)
    assert detect_format(row) == kind
    conversation = to_conversation(row, "f:9")
    assert [(m.role, m.content, m.trained) for m in conversation.messages] == expected
    assert conversation.row_id == "f:9"
    assert conversation.answer == answer
    assert conversation.metadata == {key: row[key] for key in metadata}
    assert to_conversation(row, "f:9", format=kind) == conversation
    assert row == kept, "the row itself must not change"


def test_every_format_has_a_row_here():
    assert {kind for _, kind, *_ in ROWS.values()} == set(FORMATS)


@pytest.mark.parametrize("name", ROWS)
def test_null_columns_of_other_formats_do_not_mislead(name):
    row, kind, expected, *_ = ROWS[name]
    nulls = dict.fromkeys(("messages", "conversations", "chosen", "prompt", "instruction", "text"))
    assert detect_format({**nulls, **row}) == kind
    assert turns({**nulls, **row}) == expected


def test_half_a_pair_of_common_names_is_no_prompt_and_completion():
    assert detect_format({"input": "t5: ", "text": "t"}) == "text"
    assert detect_format({"output": "o", "text": "t"}) == "text"
    with pytest.raises(RowError, match="unknown format"):
        detect_format({"query": "q", "answer": "a"})


def test_train_on_last_leaves_only_the_last_assistant_turn_trained():
    row = ROWS["alpaca"][0]
    assert [t for *_, t in turns(row, train_on="last")] == [False, False, False, True]
    assert turns({"text": "t"}, train_on="last") == [("text", "t", True)]


def test_a_turn_of_weight_zero_is_not_trained():
    row = {
        "messages": [
            {"role": "assistant", "content": "a", "weight": 0},
            {"role": "user", "content": "u", "weight": 1},
            {"role": "assistant", "content": "b", "weight": 1},
        ]
    }
    assert [t for *_, t in turns(row)] == [False, False, True]
    row["messages"][2]["weight"] = 0
    with pytest.raises(RowError, match="no trained turn"):
        to_conversation(row, "r")
    row["messages"][2]["weight"] = 0.5
    with pytest.raises(RowError, match=r"messages\[2\].weight must be 0 or 1"):
        to_conversation(row, "r")


def test_consecutive_turns_of_one_role_stay_as_they_are():
    row = {
        "messages": [
            {"role": r, "content": c} for r, c in zip(["user", "user", "assistant"] * 2, "abcdef", strict=True)
        ]
    }
    assert [m.content for m in to_conversation(row, "r").messages] == list("abcdef")


def test_sharegpt_tools_calls_and_observations():
    row = {
        "conversations": [
            {"from": "human", "value": "1+1?"},
            {"from": "function_call", "value": json.dumps({"name": "add", "arguments": {"a": 1}})},
            {"from": "observation", "value": '{"sum": 2}'},
            {"from": "gpt", "value": "2"},
        ],
        "tools": json.dumps([SCHEMA]),
    }
    conversation = to_conversation(row, "r")
    assert [m.role for m in conversation.messages] == ["user", "assistant", "tool", "assistant"]
    assert conversation.messages[1].tool_calls == (CALL,)
    assert conversation.messages[1].content == "" and conversation.messages[1].trained
    assert conversation.messages[2].content == '{"sum": 2}'
    assert conversation.tools == ({"type": "function", "function": SCHEMA},)
    assert conversation.metadata == {}


@pytest.mark.parametrize("arguments", [{"a": 1}, '{"a": 1}'])
def test_openai_tool_calls(arguments):
    inner = {"name": "add", "arguments": arguments}
    row = {
        "messages": [
            {"role": "user", "content": "1+1?"},
            {"role": "assistant", "content": None, "tool_calls": [{"id": "c1", "type": "function", "function": inner}]},
            {"role": "tool", "content": "2", "tool_call_id": "c1", "name": "add"},
            {"role": "assistant", "content": "2", "function_call": inner},
            {"role": "function", "content": "2", "name": "add"},
        ],
        "tools": [{"type": "function", "function": SCHEMA}],
    }
    conversation = to_conversation(row, "r")
    _, call, result, both, old = conversation.messages
    assert call.tool_calls == ({"id": "c1", **CALL},) and call.content == ""
    assert (result.role, result.tool_call_id, result.name) == ("tool", "c1", "add")
    assert both.tool_calls == (CALL,) and both.content == "2"
    assert (old.role, old.name) == ("tool", "add")
    assert conversation.tools == tuple(row["tools"])


@pytest.mark.parametrize(
    "call", [{"name": "now"}, {"name": "now", "arguments": None}, {"name": "now", "arguments": ""}]
)
def test_a_call_without_arguments(call):
    row = {"messages": [{"role": "assistant", "content": "", "tool_calls": [call]}]}
    (said,) = to_conversation(row, "r").messages
    assert said.tool_calls == ({"type": "function", "function": {"name": "now", "arguments": {}}},)


@pytest.mark.parametrize(
    ("value", "count"), [(None, 0), ("", 0), ([], 0), (json.dumps([SCHEMA, SCHEMA]), 2), ([json.dumps(SCHEMA)], 1)]
)
def test_tools_spellings(value, count):
    conversation = to_conversation({**ROWS["sharegpt"][0], "tools": value}, "r")
    assert conversation.tools == ({"type": "function", "function": SCHEMA},) * count


@pytest.mark.parametrize("key", REASONING_KEYS)
def test_reasoning_field_of_a_turn(key):
    row = {
        "messages": [
            {"role": "user", "content": "q", key: "not mine"},
            {"role": "assistant", "content": "a", key: "hm"},
        ]
    }
    asked, said = to_conversation(row, "r").messages
    assert asked.reasoning is None
    assert (said.content, said.reasoning, said.trace) == ("a", "hm", None)
    assert said.reasoning_path == ("messages", 1, key)


@pytest.mark.parametrize("key", REASONING_KEYS)
@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "completion": "a"},
        {"prompt": "q", "answer": "a"},
        {"question": "q", "answer": "a"},
        {"instruction": "q", "output": "a"},
        {"prompt": "q", "completion": [{"role": "assistant", "content": "a"}]},
    ],
)
def test_reasoning_field_of_a_row(row, key):
    conversation = to_conversation({**row, key: "hm"}, "r")
    assert conversation.messages[-1].reasoning == "hm"
    assert conversation.messages[-1].reasoning_path == (key,)
    assert conversation.metadata == {}


def test_row_reasoning_goes_to_the_last_assistant_turn_without_its_own():
    said = [
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": "c"},
        {"role": "tool", "content": "d"},
    ]
    row = {"prompt": "q", "completion": said, "cot": "hm"}
    read = to_conversation(row, "r")
    assert [(m.content, m.reasoning) for m in read.messages] == [(c, "hm" if c == "c" else None) for c in "qabcd"]
    said[2]["thinking"] = "own"
    read = to_conversation(row, "r")
    assert [m.reasoning for m in read.messages] == [None, None, None, "own", None]
    assert read.metadata == {"cot": "hm"}


@pytest.mark.parametrize("flag", [True, False, "on", "off", "", [], None, float("nan")])
def test_a_reasoning_field_that_only_flags_is_metadata(flag):
    conversation = to_conversation({"input": "q", "output": "a", "reasoning": flag}, "r")
    assert conversation.messages[-1].reasoning is None
    assert "reasoning" in conversation.metadata


def test_a_list_of_thoughts_is_a_trace_that_is_already_split():
    row = {"question": "q", "answer": "a", "thought": ["one", "two\n", "three"]}
    said = to_conversation(row, "r").messages[-1]
    assert said.trace == Trace(("one\n\n", "two\n", "three"), (0, 1, 2), 3)
    assert said.reasoning == said.trace.text == "one\n\ntwo\nthree"


def test_answer_of_one_line_is_its_own_reference_and_a_worked_one_is_not():
    assert to_conversation({"question": "q", "answer": 42}, "r").answer == "42"
    assert turns({"question": "q", "answer": 42})[-1] == ("assistant", "42", True)
    assert to_conversation({"question": "q", "answer": "first\nsecond"}, "r").answer is None
    assert to_conversation({"question": "q", "answer": "#### a\nb"}, "r").answer is None
    assert to_conversation({"question": "q", "solution": "", "answer": "7"}, "r").messages[-1].content == "7"


@pytest.mark.parametrize("row", [{"prompt": "q"}, {"question": "q", "final_answer": 3}, {"instruction": "q"}])
def test_rows_without_an_assistant_turn(row):
    with pytest.raises(RowError, match="no assistant turn"):
        to_conversation(row, "r")
    conversation = to_conversation(row, "r", need_assistant=False)
    assert [(m.role, m.content) for m in conversation.messages] == [("user", "q")]
    assert conversation.answer == ("3" if "final_answer" in row else None)


def test_no_generation_marked_correct():
    row = {"problem": "p", "generations": ["a", "b"], "correctness_llama": [False, False]}
    with pytest.raises(RowError, match="no generation is marked"):
        to_conversation(row, "r")
    assert turns({**row, "correctness_math_verify": [False, True]})[-1][1] == "b"
    assert turns({"problem": "p", "generations": ["a", "b"], "correctness_llama": [True]})[-1][1] == "a"


BAD = [
    ({}, r"unknown format: .*\(none\)"),
    ({"mesages": []}, r"unknown format: .*'mesages'.*did you mean 'messages'"),
    ({"messages": "hi"}, "wrong type: messages must be a list of turns, got str"),
    ({"messages": []}, "no turns"),
    ({"messages": ["hi"]}, r"wrong type: messages\[0\] must be an object, got str"),
    (
        {"messages": [{"role": "asistant", "content": ""}]},
        r"unknown role: messages\[0\].role is 'asistant'.*'assistant'",
    ),
    ({"messages": [{"content": ""}]}, r"unknown role: messages\[0\].role is None"),
    ({"messages": [{"role": ["user"], "content": ""}]}, "unknown role"),
    ({"messages": [{"role": "user", "content": 3}]}, r"wrong type: messages\[0\].content must be text, got int"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "not text: .*'image_url'"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, r"content\[0\].text must be text"),
    ({"messages": [{"role": "user", "content": [3]}]}, r"content\[0\] must be a text part"),
    ({"messages": [{"role": "user", "content": "u"}]}, "no assistant turn: .*read as messages"),
    ({"messages": [{"role": "assistant", "content": " \n"}]}, r"empty assistant turn: .*messages\[0\].content"),
    (
        {"messages": [{"role": "assistant", "content": "a", "thinking": {}}]},
        r"messages\[0\].thinking must be text or a list",
    ),
    (
        {"messages": [{"role": "assistant", "content": "a", "thinking": [1]}]},
        r"messages\[0\].thinking must be text or a list",
    ),
    (
        {"messages": [{"role": "assistant", "tool_calls": [{"name": ""}]}]},
        r"bad tool call: messages\[0\].tool_calls\[0\]",
    ),
    ({"messages": [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{"}]}]}, "not JSON inside text"),
    ({"messages": [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": "[1]"}]}]}, "must be a JSON object"),
    ({"messages": [{"role": "assistant", "tool_calls": [3]}]}, "bad tool call"),
    (
        {"conversations": [{"from": "function_call", "value": "add(1)"}]},
        r"not JSON inside text: conversations\[0\].value",
    ),
    ({"conversations": [{"from": "function_call", "value": ""}]}, r"bad tool call: conversations\[0\].value is empty"),
    ({**ROWS["sharegpt"][0], "tools": "{"}, "not JSON inside text: tools"),
    ({**ROWS["sharegpt"][0], "tools": {"name": "f"}}, "tools must be a list"),
    ({**ROWS["sharegpt"][0], "tools": [{"description": "d"}]}, r"bad tool schema: tools\[0\]"),
    ({**ROWS["sharegpt"][0], "system": 3}, "wrong type: system must be text"),
    ({"instruction": "i", "output": ""}, "empty assistant turn: .*output"),
    ({"instruction": "i", "output": "o", "history": "h"}, "history must be a list of pairs"),
    ({"instruction": "i", "output": "o", "history": [["a"]]}, r"history\[0\] must be a pair"),
    ({"prompt": 3, "completion": "c"}, "prompt must be text, got int"),
    ({"prompt": "p", "completion": True}, "completion must be text, got bool"),
    ({"prompt": "p", "completion": []}, "no turns: completion"),
    ({"question": "q", "answer": False}, "answer must be text, got bool"),
    ({"question": "q", "answer": {"a": 1}}, "answer must be text, got dict"),
    ({"problem": "p", "generations": [3]}, r"generations\[0\] must be text"),
    ({"problem": "p", "generations": []}, "'generations' must be a list that is not empty"),
    ({"chosen": "c", "rejected": "r"}, "missing field: the row has no 'prompt'"),
    ({"prompt": "p", "chosen": 3, "rejected": "r"}, "chosen must be a list of turns"),
    ({"text": 3}, "text must be text"),
    ({"text": "  "}, "empty text turn"),
    ({"text": float("nan")}, "unknown format"),
    ([], "not an object"),
    ("text", "not an object"),
]


@pytest.mark.parametrize(("row", "message"), BAD)
def test_bad_rows_say_what_and_where(row, message):
    with pytest.raises(RowError, match=message):
        to_conversation(row, "r")


@pytest.mark.parametrize(
    ("format", "row", "message"),
    [
        ("alpaca", {"instructions": "i", "output": "o"}, "no 'instruction' .did you mean 'instructions'"),
        ("sharegpt", ROWS["messages"][0], "no turns with 'from' and 'value'"),
        ("messages", {"text": "t"}, "'messages' or 'conversations'"),
        ("text", {"prompt": "p"}, "no 'text'"),
        ("preference", {"prompt": "p"}, "no 'chosen'"),
        ("prompt_completion", {"text": "p"}, "no 'prompt' or"),
        ("question_answer", {"text": "p"}, "no 'question' or"),
        ("openr1", {"problem": "p"}, "generations"),
    ],
)
def test_a_named_format_says_which_field_is_missing(format, row, message):
    with pytest.raises(RowError, match=message):
        to_conversation(row, "r", format=format)


def test_wrong_settings_are_the_users_error_and_no_bad_row():
    with pytest.raises(UserError, match="unknown data format 'alpacca'.*did you mean 'alpaca'") as caught:
        to_conversation(ROWS["alpaca"][0], "r", format="alpacca")
    assert not isinstance(caught.value, RowError)
    with pytest.raises(UserError, match="unknown train_on 'lost'.*did you mean 'last'") as caught:
        to_conversation(ROWS["alpaca"][0], "r", train_on="lost")
    assert not isinstance(caught.value, RowError)


# --- the way back


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
