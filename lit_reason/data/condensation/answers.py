"""Final answers in text: where they stand, what they are, and whether two of them agree.

This is the light check that condensation needs for every row; verification of generated answers is in
`rewards`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction

from lit_reason.data.condensation.thoughts import sentence_starts

_BRACES = re.compile(r"\\(?P<box>boxed|fbox)[ \t]*\{|\\.|[{}]", re.DOTALL)
_STATED = re.compile(
    r"\banswer\**[ \t]{0,4}(?:\bis\b|:|=)[ \t*]{0,8}:?[ \t]{0,4}(?=\S)(?=([^\n]{1,200}))", re.IGNORECASE
)
_NUMBER = re.compile(r"(?<![\w.])-?\$?\d+(?:,\d{3})*(?:\.\d+)?(?:/\d+)?(?!\w)")
_PLAIN_NUMBER = re.compile(r"([+-]?)(\d{0,60})(?:\.(\d{0,60}))?(?:/(\d{1,60}))?")
_SHORT_FRACTION = re.compile(r"\\[dt]?frac(\d)(\d)")
_FRACTION = re.compile(r"\\[dt]?frac\s?\{([^{}]{1,60})\}\s?\{([^{}]{1,60})\}")
_WRAPPED = re.compile(r"\\(?:text|textbf|mathrm|mathbf|boxed|fbox)\s?\{([^{}]*)\}")
_CHOICE = re.compile(r"\(([a-z])\)")
_DROPPED = re.compile(r"\\left|\\right|\\[,;!: ]|\\displaystyle|\\%|\\\$|\^\{?\\circ\}?|[\s$*`%]")


def stated_answer(text: str) -> str | None:
    r"""The answer that a text states in so many words.

    Args:
        text: any text.

    Returns:
        The content of the last closed `\boxed{}`, else what follows `####` on the last line (GSM8K), else
        what follows the last "answer is" or "answer:" up to the end of that sentence; None without any.
    """
    place = _stated(text)
    return place[1] if place else None


def final_answer(text: str) -> str | None:
    """The stated answer of a text, or else the last number in it.

    Args:
        text: any text.

    Returns:
        The answer as written, None when there is none.
    """
    stated = stated_answer(text)
    if stated is not None:
        return stated
    last = None
    for last in _NUMBER.finditer(text):  # noqa: B007 (the last match is wanted)
        pass
    return last[0] if last else None


def answer_start(text: str) -> int | None:
    """Where the sentence that states the final answer begins.

    Args:
        text: a worked solution.

    Returns:
        Character offset, None when no answer is stated.
    """
    place = _stated(text)
    if place is None:
        return None
    return max((start for start in sentence_starts(text) if start <= place[0]), default=0)


def answers_match(a: str, b: str) -> bool:
    """Whether two answers are the same, as numbers or as text.

    Dollar and percent signs, thousands separators, LaTeX spacing, `\\text{}`, `\\boxed{}` and letter case do
    not count; 0.5, 1/2 and `\\frac{1}{2}` are equal.

    Args:
        a: an answer.
        b: another.
    """
    left, right = _normal(a), _normal(b)
    if left == right:
        return bool(left)
    x, y = _value(left), _value(right)
    return x is not None and x == y


def _stated(text: str) -> tuple[int, str] | None:
    box = _last_box(text)
    if box:
        return box
    end = text.rstrip()
    line = end.rfind("\n") + 1
    if end.startswith("####", line) and end[line:].strip("# \t"):
        return line, end[line:].lstrip("#").strip()
    last = None
    for last in _STATED.finditer(text):  # noqa: B007
        pass
    if last is None:
        return None
    answer = _first_sentence(last[1])
    return (last.start(), answer) if answer else None


def _first_sentence(text: str) -> str:
    # The dummy word keeps "6. So" from being read as the sixth item of a list.
    cut = next(sentence_starts(f"x {text}"), len(text) + 2) - 2
    return text[:cut].strip().rstrip(".!").strip("*` ").removeprefix("\\(").removesuffix("\\)").strip("$ ")


def _last_box(text: str) -> tuple[int, str] | None:
    """Offset and content of the boxed answer that closes last; braces are matched in one forward pass."""
    if "\\boxed" not in text and "\\fbox" not in text:
        return None
    last = None
    open_braces: list[tuple[int, int, bool]] = []
    for token in _BRACES.finditer(text):
        if token["box"] or token[0] == "{":
            open_braces.append((token.start(), token.end(), bool(token["box"])))
        elif token[0] == "}" and open_braces:
            start, inside, boxed = open_braces.pop()
            if boxed:
                last = start, text[inside : token.start()].strip()
    return last if last and last[1] else None


def _normal(answer: str) -> str:
    text = _SHORT_FRACTION.sub(r"\1/\2", answer.strip().lower())
    for _ in range(3):  # nesting depth that real answers have
        text = _WRAPPED.sub(r"\1", _FRACTION.sub(_slash, text))
    text = _DROPPED.sub("", text).rstrip(".")
    choice = _CHOICE.fullmatch(text)
    text = choice[1] if choice else text
    plain = text.replace(",", "")
    # "1,234" is a number; "1,2" and "(1, 2)" are lists and keep their commas.
    return plain if re.fullmatch(r"[+-]?\d{1,3}(?:,\d{3}){1,20}(?:\.\d{1,60})?", text) else text


def _slash(fraction: re.Match[str]) -> str:
    above, below = (part if part.strip().isalnum() else f"({part})" for part in fraction.groups())
    return f"{above}/{below}"


def _value(text: str) -> Fraction | None:
    match = _PLAIN_NUMBER.fullmatch(text)
    if not match or not (match[2] or match[3]):
        return None
    sign, whole, part, below = match[1], match[2] or "0", match[3] or "", int(match[4] or 1)
    if below == 0:
        return None
    value = Fraction(int(whole + part), 10 ** len(part) * below)
    return -value if sign == "-" else value


def answer_in_trace(
    trace: str, solution: str, known: str | None
) -> tuple[str | None, Callable[[str], str | None], bool]:
    """The answer that a shorter trace must still yield, if the solution does not give it.

    Args:
        trace: the text between the think markers.
        solution: the text after them.
        known: the row's reference answer, None when it has none or it belongs to another turn.

    Returns:
        The answer (None: nothing to check), the function that reads it from a text, and whether the answer
        stands only inside the trace.
    """
    text = f"{trace}\n{solution}"
    if known is not None:
        if _yields(final_answer, solution, known):
            return None, final_answer, False
        if _yields(final_answer, text, known):
            return known, final_answer, True
    if stated_answer(solution) is not None:
        return None, stated_answer, False
    answer = stated_answer(text)
    return answer, stated_answer, answer is not None or not solution.strip()


def _yields(read: Callable[[str], str | None], text: str, answer: str) -> bool:
    found = read(text)
    return found is not None and answers_match(found, answer)


def answer_follows(text: str, answer: str) -> bool:
    """Whether a text still gives an answer: states it, or at least mentions it where it states none.

    Args:
        text: a worked solution.
        answer: the reference answer.
    """
    stated = stated_answer(text)
    if stated is None:
        return _mentions(text, answer)
    return answers_match(stated, answer) or _mentions(stated, answer)


def _mentions(text: str, answer: str) -> bool:
    """Numbers are compared by value; words must stand whole; what has other signs is compared without blanks."""
    wanted = _normal(answer)
    value = _value(wanted)
    if value is not None:
        return any(_value(_normal(number[0])) == value for number in _NUMBER.finditer(text))
    words = " ".join(answer.lower().split())
    if words and re.search(rf"(?<!\w){re.escape(words)}(?!\w)", " ".join(text.lower().split())):
        return True
    return not wanted.isalnum() and bool(wanted) and wanted in _normal(text)
