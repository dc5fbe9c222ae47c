"""Checkers: right, wrong, and unable to judge are three different things."""

from __future__ import annotations

import sys
import threading

import numpy as np
import pytest

from lit_reason.errors import UserError
from lit_reason.rewards.checkers import Checker, Verdict, get_checker


@pytest.mark.parametrize(
    ("spec", "text", "answer", "correct"),
    [
        ("numeric", "3 + 4 = 7. The answer is $7.00.", "7", True),
        ("numeric", "7 apples, or 8", "7", False),
        ("numeric", "so 1/3", "0.333", False),
        ("numeric:0.01", "so 1/3", "0.333", True),
        ("numeric:1/1000", "so 3.33", "10/3", True),
        ("numeric:1/2000", "so 3.33", "10/3", False),
        ("numeric", "I do not know", "7", False),
        ("numeric", "#### 72", "Natalia sold 24.\n#### 72", True),
        (
            "numeric",
            "\\boxed{2\\sqrt{2}}",
            "$\\sqrt{8}$",
            True,
        ),  # a reference in LaTeX is compared as mathematics
        ("numeric", "\\boxed{2\\sqrt{3}}", "$\\sqrt{8}$", False),
        ("boxed", "so \\boxed{\\frac{1}{2}}", "0.5", True),
        ("boxed", "\\boxed{x^2+2x+1}", "(x+1)^2", True),
        ("boxed", "\\boxed{x^2+2x}", "(x+1)^2", False),
        ("boxed", "\\boxed{1}, no: \\boxed{(1,2)}", "\\boxed{(1,2)}", True),
        ("boxed", "the answer is 5", "5", True),
        ("boxed", "no idea", "5", False),
        ("boxed", "\\boxed{", "5", False),
        ("exact", "  Paris.\n", "paris", True),
        ("exact", "The capital? The answer is Paris.", "Paris", True),
        ("exact", "New  York", "new york", True),
        ("exact", "Paris, France", "Paris", False),
        ("exact", "2", "12", False),
        ("choice", "Because of this, the answer is (C).", "C", True),
        ("choice", "\\boxed{\\text{C}}", "(C)", True),
        ("choice", "**Answer:** B", "B. the second", True),
        ("choice", "I weighed all of it.\nD.", "D", True),
        ("choice", "I weighed all of it.\nD", "C", False),
        ("choice", "Not (A), rather (B) fits", "B", True),
        ("choice", "A dog barks", "A", False),  # an article is no choice
        ("choice", "The answer is Cats", "C", False),
        ("choice", "The answer is option E", "E", True),
    ],
)
def test_builtin_checkers(spec, text, answer, correct):
    verdict = get_checker(spec)(text, answer)
    assert verdict.correct is correct and bool(verdict.reason) is not correct


@pytest.mark.parametrize(
    ("spec", "answer", "message"),
    [
        ("numeric", "Paris", "'Paris' is not a number"),
        ("numeric", None, "no reference answer"),
        ("exact", " ", "no reference answer"),
        ("choice", "the third", "not the letter of an option"),
        ("boxed", "$$", "nothing that math-verify can read"),
    ],
)
def test_a_reference_that_cannot_be_used_is_an_error_not_a_wrong_answer(spec, answer, message):
    with pytest.raises(UserError, match=message):
        get_checker(spec)("\\boxed{7}", answer)


def test_boxed_is_wrong_not_broken_when_the_comparison_hangs_or_fails(monkeypatch):
    from lit_reason.rewards import symbolic

    monkeypatch.setattr(symbolic, "TIMEOUT_S", 1)
    assert get_checker("boxed")("\\boxed{9^{9^{9}}}", "5") == Verdict(False, "not compared within 1 s")
    monkeypatch.setattr(symbolic.math_verify, "verify", lambda *a, **k: 1 // 0)
    assert get_checker("boxed")("\\boxed{5}", "5") == Verdict(False, "cannot be compared (ZeroDivisionError)")
    raiser = (_ for _ in ()).throw
    monkeypatch.setattr(symbolic.math_verify, "verify", lambda *a, **k: raiser(symbolic.TimeoutException()))
    assert get_checker("boxed")("\\boxed{5}", "5").reason == "cannot be compared (TimeoutException)"


def test_boxed_works_outside_the_main_thread():
    verdicts = []
    thread = threading.Thread(target=lambda: verdicts.append(get_checker("boxed")("\\boxed{6/3}", "2")))
    thread.start()
    thread.join()
    assert verdicts == [Verdict(True)]


def test_boxed_names_the_extra_when_math_verify_is_missing(monkeypatch):
    monkeypatch.delitem(sys.modules, "lit_reason.rewards.symbolic", raising=False)
    monkeypatch.delattr("lit_reason.rewards.symbolic", raising=False)
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(UserError, match=r"lit-reason\[eval\]"):
        get_checker("boxed")("\\boxed{5}", "5")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("numric", "numeric, boxed, exact, choice.*did you mean 'numeric'"),
        ("numeric:lots", "tolerance must be a number"),
        ("numeric:-1", "tolerance must be a number"),
        ("boxd:f", "no module 'boxd'.*did you mean 'boxed'"),
        ("no_such_package.checks:f", "no module 'no_such_package'"),
        ("my_checks:is_evem", "no function 'is_evem' .did you mean 'is_even'"),
        ("my_checks:LIMIT", "no function 'LIMIT'"),
    ],
)
def test_unknown_checkers_are_refused_with_a_near_match(spec, message, tmp_path, monkeypatch):
    write_checks(tmp_path, monkeypatch)
    with pytest.raises(UserError, match=message):
        get_checker(spec)


def write_checks(folder, monkeypatch):
    (folder / "my_checks.py").write_text(
        "LIMIT = 3\ndef is_even(text, answer, metadata):\n    return int(text) % metadata.get('modulus', 2) == 0\n"
    )
    (folder / "broken_checks.py").write_text("import a_package_that_is_not_there\n")
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(folder))])
    for name in ("my_checks", "broken_checks"):
        monkeypatch.delitem(sys.modules, name, raising=False)


def test_a_function_of_ones_own_from_the_current_folder(tmp_path, monkeypatch):
    write_checks(tmp_path, monkeypatch)
    checker = get_checker("my_checks:is_even")
    assert checker("4", None).correct and not checker("5", None).correct
    assert not checker("4", None, {"modulus": 3}).correct
    with pytest.raises(ValueError, match="invalid literal"):
        checker("four", None)


def test_a_missing_import_inside_ones_own_module_is_not_blamed_on_the_spec(tmp_path, monkeypatch):
    write_checks(tmp_path, monkeypatch)
    with pytest.raises(ModuleNotFoundError, match="a_package_that_is_not_there"):
        get_checker("broken_checks:f")


def test_what_a_check_may_return():
    def answering(value):
        return Checker("own", lambda *_: value, needs_answer=False)("text", None)

    assert answering(True) == answering(np.True_) == Verdict(True)
    assert answering(np.False_).correct is False
    assert answering(Verdict(False, "because")) == Verdict(False, "because")
    for value in (None, 1, "yes", 0.5):
        with pytest.raises(TypeError, match="must return a bool"):
            answering(value)
