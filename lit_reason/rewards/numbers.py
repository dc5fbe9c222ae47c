"""Numbers as people write them in answers: money, thousands, percent, fractions, powers of ten."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from lit_reason.data.condensation.answers import stated_answer

_MAX_CHARS = 200  # a longer number is no answer to check; Python also refuses to read integers of 4300 digits
_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)"
_NUMBER = rf"""(?P<sign>[+-]?)[$€£]?(?P<inner>-?)
    (?: (?:(?P<mixed>\d+)\s*)?
    \\[dt]?frac\s*\{{\s*(?P<top>-?{_DIGITS})\s*\}}\s*\{{\s*(?P<bottom>{_DIGITS})\s*\}}
      | (?:(?P<whole>\d+)\s+)? (?P<over>\d+)\s*/\s*(?P<under>\d+) (?![\d.]*[/\d])
      | (?P<plain>{_DIGITS})
        (?: [eE](?P<exp>[+-]?\d+)(?!\w) | \s*(?:\\times|\\cdot|×|\*)\s*10\^\{{?(?P<power>[+-]?\d+)\}}? )?
    )
    (?P<percent>\s*(?:\\?%|percent\b))?"""
_ANYWHERE = re.compile(rf"(?<![\w.^])(?<![\^_]\{{){_NUMBER}", re.VERBOSE)
# An answer that is one number: words may stand before it, and a unit or a remark after it. What continues a
# list or an expression (`5 or 7`, `2x`, `3:45`, `2^{10}`) makes it something else.
_ALONE = re.compile(
    rf"""(?:[A-Za-z][A-Za-z' ]*\s)?[(\[]?{_NUMBER}
    (?: [)\]]?[.,;!?]*\s*$
      | \s*(?:\^?\{{?\\circ\b|°)
      | \s+(?!(?:or|and|to|by|times|plus|minus)\b)[A-Za-z(]
      | (?=[A-Za-z]{{2}})
    )""",
    re.VERBOSE,
)
_SIGNS = str.maketrans({"\u2212": "-", "\u2013": "-", "\u00a0": " "})
_WRAPPED = re.compile(r"\\(?:text|mathrm|mathbf|textbf|boxed|mbox)\s*\{([^{}]*)\}")
_SHORT_FRACTION = re.compile(r"\\([dt]?frac)(\d)(\d)")
_IGNORED = re.compile(r"\\left|\\right|\\[,;!: $()\[\]]|\{,\}(?=\d{3})|\*\*|[`~]|(?<=[\d}%])\$|\$(?=\\)")


@dataclass(frozen=True)
class Number:
    """A number that was read from text.

    Attributes:
        value: the number before any percent sign, exactly.
        percent: a percent sign or the word followed.
    """

    value: Fraction
    percent: bool = False

    def equals(self, other: Number, tolerance: Fraction = Fraction(0)) -> bool:
        """Whether two numbers agree.

        A percent sign does not count (72 and 72% agree), and where exactly one number has it, the fraction it
        stands for agrees as well (0.72 and 72%).

        Args:
            other: the reference.
            tolerance: largest allowed difference, relative to the reference.
        """
        pairs = [(self.value, other.value)]
        if self.percent and not other.percent:
            pairs.append((self.value / 100, other.value))
        if other.percent and not self.percent:
            pairs.append((self.value, other.value / 100))
        return any(abs(a - b) <= tolerance * abs(b) for a, b in pairs)


def number_from_reference(answer: str) -> Number | None:
    """The number of a reference answer: the whole text, or what it states (`... #### 72`).

    Args:
        answer: the reference.

    Returns:
        None when it is not one number, units and signs of money aside.
    """
    number = _only_number(answer)
    if number is None and (stated := stated_answer(answer)) is not None:
        number = _only_number(stated)
    return number


def number_from_solution(text: str) -> Number | None:
    """The number that a solution ends with: its stated answer (boxed, `####`, "answer is"), else its last
    number.

    Args:
        text: a worked solution.

    Returns:
        None when there is no number, or when the stated answer is not one number.
    """
    stated = stated_answer(text)
    if stated is not None:
        return _only_number(stated)
    last = None
    for last in _ANYWHERE.finditer(_plain(text)):  # noqa: B007 (the last match is wanted)
        pass
    return _number(last) if last else None


def _only_number(text: str) -> Number | None:
    match = _ALONE.match(re.sub(r"^-\s+", "-", _plain(text).rsplit("=", 1)[-1].strip()))
    return _number(match) if match else None


def _plain(text: str) -> str:
    """The text without LaTeX wrapping and with plain minus signs."""
    text = _SHORT_FRACTION.sub(r"\\\1{\2}{\3}", _WRAPPED.sub(r" \1", text.translate(_SIGNS)))
    return _IGNORED.sub("", text)


def _number(match: re.Match[str]) -> Number | None:
    if len(match[0]) > _MAX_CHARS:
        return None
    if match["top"] is not None:
        below = _decimal(match["bottom"])
        value = Fraction(match["mixed"] or 0) + _decimal(match["top"]) / below if below else None
    elif match["over"] is not None:
        below = Fraction(match["under"])
        value = Fraction(match["whole"] or 0) + Fraction(match["over"]) / below if below else None
    else:
        exponent = int(match["exp"] or match["power"] or 0)
        value = _decimal(match["plain"]) * Fraction(10) ** exponent if abs(exponent) <= 400 else None
    if value is None:
        return None
    negative = (match["sign"] == "-") != (match["inner"] == "-")
    return Number(-value if negative else value, bool(match["percent"]))


def _decimal(text: str) -> Fraction:
    return Fraction(text.replace(",", ""))
