"""Is an answer right? One checker for each kind of answer, and the way to a checker of your own."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import Any

from lit_reason.data.condensation.answers import stated_answer
from lit_reason.errors import UserError
from lit_reason.plugins import load_function
from lit_reason.rewards.numbers import number_from_reference, number_from_solution


@dataclass(frozen=True)
class Verdict:
    """What a checker says about one completion.

    Attributes:
        correct: the answer is right.
        reason: a few words on why it is not; empty when it is.
    """

    correct: bool
    reason: str = ""


@dataclass(frozen=True)
class Checker:
    """A named check of one text against one reference answer.

    Attributes:
        name: as the user wrote it.
        check: `(text, answer, metadata) -> bool or Verdict`; pure, and may raise when it cannot judge.
        needs_answer: without a reference answer there is nothing to check.
    """

    name: str
    check: Callable[[str, str | None, dict[str, Any]], bool | Verdict]
    needs_answer: bool = True

    def __call__(self, text: str, answer: str | None, metadata: dict[str, Any] | None = None) -> Verdict:
        """Judge one text.

        Args:
            text: what the model wrote (the solution, unless the caller wants the thoughts checked as well).
            answer: the reference answer.
            metadata: further fields of the record.

        Returns:
            The verdict.

        Raises:
            UserError: the row has no usable reference answer.
            TypeError: the check returned neither a bool nor a `Verdict`.
            Exception: whatever a check of the user's own raises. A caller counts these apart from wrong
                answers.
        """
        if self.needs_answer and (answer is None or not answer.strip()):
            raise UserError(f"the row has no reference answer, which checker '{self.name}' needs")
        result = self.check(text, answer, metadata or {})
        if isinstance(result, Verdict):
            return result
        if isinstance(result, bool) or type(result).__name__ in (
            "bool_",
            "bool",
        ):  # numpy's, without importing it
            return Verdict(bool(result), "" if result else "wrong")
        raise TypeError(f"checker '{self.name}' must return a bool, it returned {result!r}")


def get_checker(spec: str) -> Checker:
    r"""The checker that a recipe names.

    * `numeric`: the stated answer (`\boxed{}`, `####`, "answer is"), or else the last number, equals the
    reference
      exactly; money, thousands, percent, fractions and powers of ten are understood. `numeric:0.01` allows a
      relative difference of 1 %. A reference in LaTeX that is not one number goes to `boxed`.
    * `boxed`: mathematically equal, by the math-verify package (extra `eval`).
    * `exact`: the whole text, or its stated answer, equals the reference but for case, blanks and end
    punctuation. * `choice`: the letter of an option, A to J.
    * `package.module:function`: a function `(text, answer, metadata) -> bool`.

    Args:
        spec: one of the above.

    Returns:
        The checker.

    Raises:
        UserError: there is no such checker, or its module cannot be imported.
    """
    name, _, option = spec.partition(":")
    if name == "numeric" and option:
        return Checker(spec, partial(check_numeric, tolerance=_tolerance(spec, option)))
    if spec in BUILTIN:
        return Checker(spec, BUILTIN[spec])
    return Checker(spec, load_function(spec, "checker", BUILTIN), needs_answer=False)


def check_numeric(
    text: str, answer: str | None, metadata: dict[str, Any], *, tolerance: Fraction = Fraction(0)
) -> Verdict:
    """Whether the number a solution ends with is the reference (see `get_checker`).

    Args:
        text: a worked solution.
        answer: one number, LaTeX, or a solution that states its answer.
        metadata: not used.
        tolerance: largest allowed difference, relative to the reference.

    Returns:
        The verdict.

    Raises:
        UserError: the reference is neither a number nor LaTeX.
    """
    reference = number_from_reference(answer or "")
    if reference is None:
        if "\\" in (answer or ""):
            return check_boxed(text, answer, metadata)
        raise UserError(f"reference answer {_short(answer)} is not a number; use checker 'exact' or 'boxed'")
    given = number_from_solution(text)
    if given is None:
        return Verdict(False, "no number found")
    return Verdict(True) if given.equals(reference, tolerance) else Verdict(False, "another number")


def check_boxed(text: str, answer: str | None, metadata: dict[str, Any]) -> Verdict:
    """Whether the final expression of a solution is mathematically equal to the reference.

    Args:
        text: a worked solution, its answer best in a `\\boxed{}`.
        answer: the reference, in LaTeX or plain; boxed or not.
        metadata: not used.

    Returns:
        The verdict. An answer that math-verify cannot read, or not within its time limit, is wrong.

    Raises:
        UserError: math-verify is not installed, or it cannot read the reference.
    """
    from lit_reason.rewards import symbolic  # math-verify is an extra, and takes a second to import

    return Verdict(*symbolic.equal(text, answer or ""))


def check_exact(text: str, answer: str | None, metadata: dict[str, Any]) -> Verdict:
    """Whether a text, or the answer it states, is the reference but for case, blanks and end punctuation.

    Args:
        text: a solution.
        answer: the reference.
        metadata: not used.

    Returns:
        The verdict.
    """
    reference = _normal(answer or "")
    stated = stated_answer(text)
    same = _normal(text) == reference or (stated is not None and _normal(stated) == reference)
    return Verdict(True) if same else Verdict(False, "another text")


def check_choice(text: str, answer: str | None, metadata: dict[str, Any]) -> Verdict:
    """Whether a solution chooses the reference option.

    Args:
        text: a solution; the option is its stated answer, or else the letter its last line starts with, or
            else the last letter in parentheses.
        answer: the letter, `C`, `(C)` or `C. text of the option`.
        metadata: not used.

    Returns:
        The verdict.

    Raises:
        UserError: the reference is not a letter from A to J.
    """
    reference = _leading_letter(answer or "")
    if reference is None:
        raise UserError(f"reference answer {_short(answer)} is not the letter of an option, A to J")
    given = _chosen_letter(text)
    if given is None:
        return Verdict(False, "no option found")
    return Verdict(True) if given == reference else Verdict(False, "another option")


BUILTIN: dict[str, Callable[[str, str | None, dict[str, Any]], bool | Verdict]] = {
    "numeric": check_numeric,
    "boxed": check_boxed,
    "exact": check_exact,
    "choice": check_choice,
}

_LETTER = re.compile(r"[\s*$({\[\\]*(?:text|mathrm|mathbf)?[\s{(*]*(?:[Oo]ption|[Cc]hoice)?[\s(*]*([A-J])(?![\w'])")
_PARENTHESES = re.compile(r"\(([A-J])\)")


def _leading_letter(text: str) -> str | None:
    match = _LETTER.match(text)
    return match[1] if match else None


def _chosen_letter(text: str) -> str | None:
    stated = stated_answer(text)
    if stated is not None and (letter := _leading_letter(stated)):
        return letter
    lines = text.strip().splitlines()
    # "A" and "I" begin ordinary sentences: at the start of a line a letter counts when punctuation or nothing
    # follows.
    if lines and (match := re.match(r"[\s*(]*([A-J])(?:[\s*)]*$|[*)]*[).:])", lines[-1])):
        return match[1]
    letters = _PARENTHESES.findall(text)
    return letters[-1] if letters else None


def _normal(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split()).strip(" .!?\"'`*$")


def _short(answer: str | None) -> str:
    return repr(answer if answer is None or len(answer) <= 60 else answer[:57] + "...")


def _tolerance(spec: str, option: str) -> Fraction:
    try:
        value = Fraction(option)
    except (ValueError, ZeroDivisionError):
        value = Fraction(-1)
    if value < 0:
        raise UserError(f"checker is '{spec}'; the tolerance must be a number of at least 0, as in numeric:0.01")
    return value
