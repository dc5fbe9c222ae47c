"""Adapters: what each format reads as, what is refused and why."""

import copy
import json

import pytest
from format_rows import CALL, ROWS, SCHEMA, turns

from lit_reason.data.conversation import Trace
from lit_reason.data.reading.formats import FORMATS, detect_format, to_conversation
from lit_reason.data.reading.turns import REASONING_KEYS
from lit_reason.errors import RowError, UserError


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
