"""Numbers as people write them."""

from __future__ import annotations

from fractions import Fraction as F

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_reason.rewards.numbers import Number, number_from_reference, number_from_solution


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("72", F(72)),
        ("+5", F(5)),
        ("-5", F(-5)),
        ("- 5", F(-5)),
        ("\u22127", F(-7)),
        ("1,234,567", F(1234567)),
        ("$1,234.50", F(2469, 2)),
        ("-$5", F(-5)),
        ("$-5", F(-5)),
        ("\\$18", F(18)),
        ("\u20ac3", F(3)),
        ("$70{,}000$", F(70000)),
        (".5", F(1, 2)),
        ("0.5.", F(1, 2)),
        ("3/4", F(3, 4)),
        ("6 / 8", F(3, 4)),
        ("1 1/2", F(3, 2)),
        ("-1 1/2", F(-3, 2)),
        ("\\frac{3}{4}", F(3, 4)),
        ("$\\dfrac{3}{4}$", F(3, 4)),
        ("-\\frac12", F(-1, 2)),
        ("\\frac{-3}{4}", F(-3, 4)),
        ("1\\frac{1}{2}", F(3, 2)),
        ("1e-3", F(1, 1000)),
        ("2.5 \\times 10^{3}", F(2500)),
        ("1.5\u00d710^6", F(1500000)),
        ("3 * 10^-2", F(3, 100)),
        ("12 apples", F(12)),
        ("18 dollars for 3 days", F(18)),
        ("12 (since 3*4)", F(12)),
        ("100 km^2", F(100)),
        ("18\\text{ cm}", F(18)),
        ("\\text{18}", F(18)),
        ("90^\\circ", F(90)),
        ("90\u00b0", F(90)),
        ("x = 5", F(5)),
        ("48/2 = 24", F(24)),
        ("about 5", F(5)),
        ("(5)", F(5)),
        ("**5**", F(5)),
        ("\\boxed{5}", F(5)),
        ("She has 3 * 4 = 12.\n#### 72", F(72)),
    ],
)
def test_one_number(text, value):
    assert number_from_reference(text) == Number(value)


@pytest.mark.parametrize(
    "text",
    ["", "two", "(1, 2)", "1,2", "12,34", "5 or 7", "5 to 7", "2x", "5x", "x+3", "x^2", "\\sqrt{2}", "2^{10}",
     "3\\pi", "3:45", "1/2/3", "1.2.3", "5 - 3", "5/0", "\\frac{1}{0}", "A5", "9" * 300, "1e999999999"],
)  # fmt: skip
def test_not_one_number(text):
    assert number_from_reference(text) is None


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("First 3, then 4, so 3 + 4 = 7.", F(7)),
        ("It took 1,250.75 dollars", F(5003, 4)),
        ("from 7-3 we get", F(3)),  # a minus between two numbers is no sign
        ("so x = -3", F(-3)),
        ("The answer is 5. There were 3 trials.", F(5)),
        ("\\boxed{12} was found in step 9", F(12)),
        ("an area of 100 km^2", F(100)),
        ("x_1 is \\frac{1}{3}", F(1, 3)),
        ("the result is 40%", F(40)),
    ],
)
def test_the_number_a_solution_ends_with(text, value):
    number = number_from_solution(text)
    assert number is not None and number.value == value


@pytest.mark.parametrize("text", ["", "none", "\\boxed{(1,2)} after 3 steps", "The answer is 5 or 7."])
def test_solutions_without_one_number(text):
    assert number_from_solution(text) is None


def test_equality_is_exact_but_for_percent_and_tolerance():
    assert Number(F(1, 3)).equals(Number(F(1, 3)))
    assert not Number(F("0.3333333333333333")).equals(Number(F(1, 3)))
    assert Number(F("0.333")).equals(Number(F(1, 3)), F(1, 1000))
    assert not Number(F("0.333")).equals(Number(F(1, 3)), F(1, 1001))
    assert Number(F(-99)).equals(Number(F(-100)), F(1, 100))
    fifty = Number(F(50), percent=True)
    assert fifty.equals(Number(F(50))) and fifty.equals(Number(F(1, 2))) and fifty.equals(fifty)
    assert Number(F(50)).equals(fifty) and Number(F(1, 2)).equals(fifty)
    assert not fifty.equals(Number(F(1, 2), percent=True)) and not Number(F(50)).equals(Number(F(1, 2)))
    assert not Number(F(5000)).equals(fifty)


@given(st.decimals(-(10**9), 10**9, allow_nan=False, places=4), st.booleans(), st.sampled_from(["", "$"]))
def test_any_decimal_is_read_back(value, grouped, sign):
    written = f"{abs(value):,}" if grouped else f"{abs(value):f}"
    text = ("-" if value < 0 else "") + sign + written
    assert number_from_reference(text) == Number(F(value))
    assert number_from_solution(f"We had 17 before; now {text}") == Number(F(value))


@given(st.text(st.sampled_from("0123456789,./-+$%{}\\ ^=()efracx\n"), max_size=60))
def test_odd_text_never_raises(text):
    for read in (number_from_reference, number_from_solution):
        number = read(text)
        assert number is None or number.equals(number)
