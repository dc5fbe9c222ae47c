"""Final answers: where they are found, what is equal, and hostile text."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_reason.data.condensation.answers import (
    answer_follows,
    answer_in_trace,
    answer_start,
    answers_match,
    final_answer,
    stated_answer,
)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{7}.", "7"),
        (r"\boxed{1} then \boxed{\frac{1}{2}} and { an open brace", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\fbox {x^{2}}", "x^{2}"),
        (r"\boxed{3} later \boxed{never closed", "3"),
        (r"\boxed{}. The answer is 4.", "4"),
        ("9 + 9 = 18\n#### 18\n", "18"),
        ("#### 1. A heading\nno number", None),
        ("The answer is 5? Wait, no, the answer is 6. Done", "6"),
        ("**Final Answer:** B", "B"),
        ("Answer: (C)", "(C)"),
        ("the final answer is \\( 3.5 \\).", "3.5"),
        ("The answer is: 12 apples.\nThat was easy.", "12 apples"),
        (r"\boxed{2}. The answer is 3.", "2"),
        ("there were 3 cats", None),
        ("", None),
    ],
)
def test_stated_answers(text, answer):
    assert stated_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("there were 3 cats and 1,234.5 dogs", "1,234.5"),
        ("it is -4", "-4"),
        ("5-3 of B12", "3"),
        ("lists 1,2,3", "3"),
        ("three quarters, 3/4, of it", "3/4"),
        ("v1.2.3b", None),
        ("The answer is 8, not 9", "8, not 9"),
    ],
)
def test_the_last_number_where_nothing_is_stated(text, answer):
    assert final_answer(text) == answer


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        ("1,234", "1234", True),
        ("1,2", "12", False),
        (r"\frac{1}{2}", "0.5", True),
        (r"\dfrac12", ".50", True),
        (r"\frac{1+2}{3}", "1+2/3", False),
        ("50\\%", "50", True),
        ("$18", "18.00", True),
        ("(C)", "c", True),
        ("(1, 2)", "(1,2)", True),
        (r"\text{ yes }", "Yes.", True),
        (r"\boxed{\text{no}}", "no", True),
        ("-3", "3", False),
        ("+3", "3", True),
        (r"90^\circ", "90", True),
        ("1/0", "1/0", True),
        ("1/0", "2/0", False),
        ("", "", False),
        ("0.33", "1/3", False),
        ("9" * 50, "9" * 49 + "8", False),
    ],
)
def test_answers_match(a, b, same):
    assert answers_match(a, b) is same
    assert answers_match(b, a) is same


@given(st.integers(-(10**9), 10**9))
def test_a_number_matches_its_spellings(n):
    assert answers_match(str(n), f"{n:,}")
    assert answers_match(f"${n}.0$", str(n))
    assert not answers_match(str(n), str(n + 1))
    assert answers_match(final_answer(f"It is {n:,} in all."), str(n))


@given(st.text(alphabet="\\boxed{} answer is:#4.\n$%,()/-", max_size=60), st.text(max_size=20))
def test_no_text_crashes(text, other):
    answer = final_answer(text)
    assert answer is None or answer.strip() == answer
    assert answers_match(text, other) == answers_match(other, text)
    start = answer_start(text)
    assert (start is None) == (stated_answer(text) is None)
    assert start is None or 0 <= start < len(text)


def test_where_the_answer_starts():
    assert answer_start("a\nb\n#### 72\n") == 4
    assert answer_start("First this. So the answer is 5. Bye") == 12
    assert answer_start("no answer 5") is None


def test_what_a_shorter_trace_must_still_yield():
    answer, read, inside = answer_in_trace("lots", "It is 72 clips.", "72")
    assert (answer, inside) == (None, False)  # the solution gives it
    answer, read, inside = answer_in_trace(r"so \boxed{72}, of 9", "Done.", "72")
    assert (answer, inside) == ("72", True) and read(r"\boxed{72}") == "72"
    answer, read, inside = answer_in_trace("in all 72", "", "72")
    assert (answer, inside) == ("72", True) and read("just 72") == "72"
    # The row disagrees with the text: only what the text itself states can be lost.
    answer, read, inside = answer_in_trace("the answer is 3", "", "72")
    assert (answer, inside) == ("3", True) and read("just 3") is None
    assert answer_in_trace("there were 5", "", None)[0::2] == (None, True)
    assert answer_in_trace("there were 5", "Hello.", None)[0::2] == (None, False)
    assert answer_in_trace("x", r"\boxed{1}", None)[0::2] == (None, False)


@pytest.mark.parametrize(
    "unit", ["\\boxed{", "{", "1,", "1", "answer is ", "#### ", ". ", "\\frac{1}{", "answer" + " " * 9, "1/"]
)
def test_hostile_text_takes_no_quadratic_work(unit):
    text = unit * (200_000 // len(unit))
    began = time.process_time()
    final_answer(text + "x")
    answer_start("\n" + text)
    answers_match(text, text + "y")
    assert time.process_time() - began < 30  # processor time: linear work takes under a second, quadratic minutes


@pytest.mark.parametrize(
    ("text", "answer", "follows"),
    [
        ("so \\boxed{42}", "42", True),
        ("so \\boxed{41}, not 42", "42", False),
        ("first \\boxed{42}, no: \\boxed{41}", "42", False),
        ("The answer is x = 42.", "42", True),
        ("The answer is 142.", "42", False),
        ("it is 42, found in 3 steps", "42", True),
        ("it is 1,042 in 3 steps", "1042", True),
        ("it is 142 or 4.2", "42", False),
        ("half of it: 0.5", "1/2", True),
        ("He said yes at once", "Yes", True),
        ("his eyes", "yes", False),
        ("then x = \\frac{ \\pi }{4} holds", "\\frac{\\pi}{4}", True),
        ("then x = \\pi holds", "\\frac{\\pi}{4}", False),
        ("", "42", False),
        ("no number", "", False),
    ],
)
def test_answer_follows_from_what_is_stated_or_else_mentioned(text, answer, follows):
    assert answer_follows(text, answer) is follows
