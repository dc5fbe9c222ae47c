"""Rewards of dialogues with tools: the published definitions, worked out by hand."""

import pytest

from lit_reason.rewards.dialogue import Dialogue, Turn
from lit_reason.rewards.tool_use import TOOL_USE, accepted, plain

TASK = {"answers": ["The Vorna", "Vorna River"]}


def call(result=None, text="<search> x </search>"):
    return Turn(text, "", {"kind": "tool", "ran": result is not None, "result": result or "", "answer": None})


def reply(answer, text=None):
    text = text if text is not None else f"<answer>{answer}</answer>"
    return Turn(text, "", {"kind": "answer", "ran": False, "result": "", "answer": answer})


def lost(text="hm"):
    return Turn(text, "Error: ...", {"kind": "neither", "ran": False, "result": "", "answer": None})


def pay(name, *turns, task=TASK):
    return TOOL_USE[name](Dialogue(task, turns, True))


def test_calls_that_ran_share_one():
    assert pay("executed", call("a"), call(), reply("x")) == [0.5, 0.0, 0.0]
    assert pay("executed", call("a"), call("b"), reply("x")) == [0.5, 0.5, 0.0]
    assert pay("executed", lost(), reply("x")) == [0.0, 0.0]


def test_the_first_result_counts_or_every_one():
    hit, miss = call("it lies on THE VORNA, they say"), call("nothing here")
    assert pay("first_result_has_answer", call(), hit, hit, reply("x")) == [0.0, 1.0, 0.0, 0.0]
    assert pay("first_result_has_answer", miss, hit, reply("x")) == [0.0, 0.0, 0.0]
    assert pay("result_has_answer", miss, hit, hit, reply("x")) == [0.0, 1.0, 1.0, 0.0]


def test_form_and_number_of_calls():
    turns = (call("a"), lost(), call(), reply("x"))
    assert pay("turn_format", *turns) == [1.0, -2.0, 1.0, 0.0]
    assert pay("calls_so_far", *turns) == [1.0, 0.0, 2.0, 0.0]


@pytest.mark.parametrize(
    ("answer", "present", "exact", "strict", "graded"),
    [
        ("the vorna ", 1, 1, 1, 1.0),
        ("Vorna.", 0, 1, 0, 1.0),
        ("It is the Vorna River", 1, 0, 0, 0.2),
        ("Kelm", 0, 0, 0, 0.2),
    ],
)
def test_answers(answer, present, exact, strict, graded):
    names = ("answer_present", "exact_match", "exact_match_strict", "graded_answer")
    assert [pay(name, call("a"), reply(answer)) for name in names] == [present, exact, strict, graded]


def test_without_an_answer_or_with_a_malformed_turn():
    for name in ("answer_present", "exact_match", "exact_match_strict"):
        assert pay(name, call("a"), lost()) == 0.0
    assert pay("graded_answer", call("a")) == -1.0
    assert pay("graded_answer", lost(), reply("Vorna")) == -1.0


WELL = "<reasoning>\nlook it up\n</reasoning>\n<tool>\n{}\n</tool>"


@pytest.mark.parametrize(
    ("text", "form", "tags"),
    [
        (WELL, 1.0, 1.0),
        ("<think> a </think> <answer> b </answer>", 1.0, 1.0),
        ("<reasoning>a</reasoning><tool>{}</tool>", 0.8, 1.0),  # text touches the tags
        ("so <reasoning> a </reasoning> <tool> {} </tool>", 0.8, 1.0),
        ("<tool> {} </tool>", 0.6, 0.5),  # one field of two: 0.2, apart, ends with the action
        ("<reasoning> a </reasoning> <tool> {}", 0.6, 0.75),
        ("<reasoning> a <reasoning> b </reasoning> <tool> {} </tool>", 1.0, 0.75),
        ("nothing", 0.0, 0.0),
    ],
)
def test_the_form_of_a_turn(text, form, tags):
    assert pay("message_format", call("a", text)) == pytest.approx(form)
    assert pay("tag_counts", call("a", text)) == pytest.approx(tags)
    assert pay("message_format", call("a", text), lost("")) == pytest.approx(form / 2)  # a mean over turns


def test_answers_are_compared_as_question_answering_does():
    assert plain("The  Quick, brown fox!") == "quick brown fox"
    assert plain("Anthea") == "anthea"  # articles are words
    assert accepted({"answer": 7}) == ["7"] and accepted({"answers": ["a", "b"], "answer": "c"}) == ["a", "b"]
    for wrong in ({}, {"answers": "a"}, {"answers": []}):
        with pytest.raises(ValueError, match="neither"):
            accepted(wrong)


def test_an_environment_without_these_facts_is_told_so():
    with pytest.raises(ValueError, match="reports no 'kind'"):
        TOOL_USE["executed"](Dialogue(TASK, (Turn("a", "", {}),), True))
