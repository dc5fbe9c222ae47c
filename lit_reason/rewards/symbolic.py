"""Mathematical equality through the math-verify package (extra `eval`)."""

from __future__ import annotations

import threading
import time
from functools import lru_cache
from typing import Any

from lit_reason.data.condensation.answers import stated_answer
from lit_reason.errors import UserError

TIMEOUT_S = 3
_TAIL_CHARS = 4000  # the answer stands at the end; reading all of a long derivation is slow

try:
    import math_verify
    from math_verify.errors import TimeoutException
except ImportError as error:
    raise UserError("checker 'boxed' needs the math-verify package: pip install 'lit-reason[eval]'") from error


def equal(text: str, answer: str) -> tuple[bool, str]:
    """Whether the final expression of a text equals a reference.

    Args:
        text: a worked solution.
        answer: the reference, in LaTeX or plain; or a solution that states it.

    Returns:
        The verdict, and why it is negative.

    Raises:
        UserError: the reference holds nothing that math-verify can read.
    """
    gold = _reference(answer)
    start = time.monotonic()
    limit = _limit()
    try:
        stated = stated_answer(text)
        given = math_verify.parse(_boxed(stated) if stated else text[-_TAIL_CHARS:], parsing_timeout=limit)
        correct = bool(given) and math_verify.verify(list(gold), given, timeout_seconds=limit)
    except (Exception, TimeoutException) as error:  # sympy raises nearly anything on odd input
        return False, f"cannot be compared ({type(error).__name__})"
    if correct:
        return True, ""
    if time.monotonic() - start >= TIMEOUT_S:
        return False, f"not compared within {TIMEOUT_S} s"
    return False, "another value" if given else "no answer found"


@lru_cache(maxsize=4096)
def _reference(answer: str) -> tuple[Any, ...]:
    try:
        gold = math_verify.parse(_boxed(stated_answer(answer) or answer), parsing_timeout=_limit())
    except (Exception, TimeoutException):
        gold = []
    if not gold:
        raise UserError(f"reference answer {answer[:60]!r} is nothing that math-verify can read")
    return tuple(gold)


def _boxed(answer: str) -> str:
    return f"\\boxed{{{answer.strip().strip('$')}}}"


def _limit() -> int | None:
    """math-verify keeps time by a signal, which only the main thread can take."""
    return TIMEOUT_S if threading.current_thread() is threading.main_thread() else None
