"""What a thought is: segmenters that cut a trace into pieces which, laid end to end, are the trace again.

The paper's own delimiters were not found in any source; the three modes here are this project's definition,
with the cue words taken from two code bases of the same research group. Every segmenter takes time linear in
the text.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator

from lit_reason.data.config import Segmenter
from lit_reason.data.token_row import Segment
from lit_reason.errors import UserError

SEGMENTER_VERSION = 1  # part of cache keys and ledgers: raise when the same text would be cut differently

CUES: tuple[str, ...] = (
    "wait",
    "but",
    "alternatively",
    "okay",
    "hmm",
    "albeit",
    "however",
    "yet",
    "still",
    "nevertheless",
    "though",
    "meanwhile",
    "whereas",
)

MATH_SPAN = 4000  # characters; a longer `$$ .. $$` or `\[ .. \]` is a stray delimiter, not display mathematics
_MAX_FENCE = 8  # fence lengths above this count as equal, so that a text has few distinct ones

_BLANK = re.compile(r"\n[^\S\n]*\n\s*")
_LINE = re.compile(r"\n\s*")
_CUE = re.compile(rf"(?<!\S)(?:{'|'.join(CUES)})(?=[\s,.])", re.IGNORECASE)
_SENTENCE = re.compile(r"(?<=[.!?…])[\"'”’)\]*]*\s+")
_GUARD_MARKS = ("```", "~~~", "$$", "\\[", "\\begin{")  # a text with none of them has nothing to guard
_GUARD = re.compile(
    r"^[^\S\n]*(?P<fence>`{3,}|~{3,})(?P<info>[^\n]*)$"
    r"|(?P<escape>\\\\)"  # a LaTeX row end; without it `\\[2pt]` would read as `\[`
    r"|(?P<dollars>\${2,})|(?P<left>\\\[)|(?P<right>\\\])"
    r"|\\(?P<edge>begin|end)\{(?P<name>[^{}\n]{1,64})\}",
    re.MULTILINE,
)


def segment(
    text: str,
    segmenter: Segmenter = "paragraph",
    *,
    min_chars: int = 16,
    pattern: re.Pattern[str] | None = None,
) -> list[str]:
    """Cut a trace into thoughts.

    No cut falls inside a closed code fence, `$$ .. $$`, `\\[ .. \\]` or `\\begin{x} .. \\end{x}`. A delimiter
    that is never closed guards nothing.

    Args:
        text: the trace.
        segmenter: `paragraph`, `cue`, `paragraph+cue` or `regex`.
        min_chars: `paragraph` and `paragraph+cue`: a fragment shorter than this joins the thought before it.
        pattern: separator of `regex`; each match ends a thought.

    Returns:
        Thoughts, none of them empty, whose concatenation is `text`. Each carries its trailing separator.

    Raises:
        UserError: `regex` without a pattern, or a segmenter that cannot cut text.
    """
    if segmenter == "paragraph":
        return _pieces(text, _glue(text, _guarded(text, _paragraph_starts(text)), min_chars))
    if segmenter == "cue":
        return _pieces(text, _guarded(text, _cue_starts(text)))
    if segmenter == "paragraph+cue":
        starts = _glue(text, _guarded(text, _paragraph_starts(text)), min_chars)
        return _pieces(text, [s for s in starts if _CUE.match(text, _skip_blanks(text, s))])
    if segmenter == "regex" and pattern is not None:
        return _pieces(text, _guarded(text, (m.end() for m in pattern.finditer(text) if m.end())))
    raise UserError(f"segmenter '{segmenter}' needs " + ("a pattern" if segmenter == "regex" else "a list of thoughts"))


def sentences(text: str, min_chars: int = 16) -> list[str]:
    """Cut one thought into sentences and lines, for traces that have no paragraphs.

    A sentence ends with `.`, `!`, `?` or `…` before white space and anything but a lower-case letter, or with
    its line. A number at the start of a line (`1. First`) ends nothing. Guards and short fragments as in
    `segment`.

    Args:
        text: the thought.
        min_chars: a fragment shorter than this joins the sentence before it.

    Returns:
        Sentences whose concatenation is `text`.
    """
    return _pieces(text, _glue(text, _guarded(text, sentence_starts(text)), min_chars))


def split_giant(thoughts: list[str], sizes: list[int], min_chars: int = 16) -> list[str]:
    """Replace a thought that holds more than half of the tokens by its sentences.

    Args:
        thoughts: the thoughts of a trace.
        sizes: tokens of each.
        min_chars: as in `sentences`.

    Returns:
        The thoughts, the giant one cut; the same list when there is none.
    """
    at = giant(sizes)
    if at is None:
        return thoughts
    return thoughts[:at] + sentences(thoughts[at], min_chars) + thoughts[at + 1 :]


def giant(sizes: list[int]) -> int | None:
    """Index of the thought that holds more than half of all tokens, if there is one.

    Args:
        sizes: tokens of each thought.
    """
    if not sizes:
        return None
    at = max(range(len(sizes)), key=sizes.__getitem__)
    return at if 2 * sizes[at] > sum(sizes) else None


def stage(origin: int, total: int) -> Segment:
    """Stage of a thought by its place in the full trace.

    The borders are the edges that EPiC keeps at tau = 0.5 and rho = 0.5, whatever strategy condensed the row,
    so that metrics by stage mean the same in every arm of a comparison.

    Args:
        origin: index of the thought in the full trace.
        total: number of thoughts in the full trace.

    Returns:
        `UNDERSTANDING`, `EXPLORATION` or `CONVERGENCE`. A single thought is `CONVERGENCE`.
    """
    kept = min(max(-(-total // 2), 2), total)
    tail = kept // 2 if total > 1 else 1
    if origin >= total - tail:
        return Segment.CONVERGENCE
    return Segment.UNDERSTANDING if origin < kept - tail else Segment.EXPLORATION


def sentence_starts(text: str) -> Iterator[int]:
    """Offsets, ascending, at which a sentence or a line begins (see `sentences`)."""
    ends = sorted(
        {m.end() for m in _SENTENCE.finditer(text) if _ends_sentence(text, m)}
        | {_line_start(text, m) for m in _LINE.finditer(text)}
    )
    return iter(ends)


def _ends_sentence(text: str, match: re.Match[str]) -> bool:
    if text[match.end() : match.end() + 1].islower():
        return False  # "e.g. this"
    before = match.start() - 1
    if text[before] != ".":
        return True
    digit = before
    while digit > 0 and before - digit < 4 and text[digit - 1].isdigit():
        digit -= 1
    return digit == before or not _opens_line(text, digit)


def _opens_line(text: str, at: int) -> bool:
    while at > 0 and text[at - 1] in " \t*":
        at -= 1
    return at == 0 or text[at - 1] == "\n"


def _paragraph_starts(text: str) -> Iterator[int]:
    return (_line_start(text, m) for m in _BLANK.finditer(text))


def _line_start(text: str, gap: re.Match[str]) -> int:
    """Start of the line that follows a gap: its indentation belongs to it."""
    return text.rfind("\n", gap.start(), gap.end()) + 1


def _cue_starts(text: str) -> Iterator[int]:
    for match in _CUE.finditer(text):
        at = match.start()
        while at > 0 and text[at - 1].isspace() and text[at - 1] != "\n":
            at -= 1
        if at == 0 or text[at - 1] in "\n.!?…":
            yield match.start() if at and text[at - 1] != "\n" else at


def _skip_blanks(text: str, at: int) -> int:
    while at < len(text) and text[at].isspace():
        at += 1
    return at


def _pieces(text: str, starts: Iterable[int]) -> list[str]:
    """Cut at the given offsets; those that would leave only white space before the first cut are no cuts."""
    first = len(text) - len(text.lstrip())
    edges = [0, *(s for s in starts if first < s < len(text)), len(text)]
    return [text[a:b] for a, b in zip(edges, edges[1:], strict=False) if a < b]


def _glue(text: str, starts: Iterable[int], min_chars: int) -> list[int]:
    """Drop the cuts before fragments shorter than `min_chars`, not counting the white space around them."""
    edges = [*starts, len(text)]
    return [a for a, b in zip(edges, edges[1:], strict=False) if len(text[a:b].strip()) >= min_chars]


def _guarded(text: str, starts: Iterable[int]) -> list[int]:
    """The cuts that do not fall strictly inside a guarded span."""
    spans = guarded_spans(text)
    begins = [a for a, _ in spans]
    kept = []
    for start in starts:
        at = bisect_right(begins, start) - 1
        if at < 0 or not begins[at] < start < spans[at][1]:
            kept.append(start)
    return kept


def guarded_spans(text: str) -> list[tuple[int, int]]:
    """Code fences, display mathematics and LaTeX environments: spans in which no thought may end.

    Args:
        text: the trace.

    Returns:
        Disjoint `(start, end)` character offsets in ascending order.
    """
    if not any(mark in text for mark in _GUARD_MARKS):
        return []
    tokens = [m for m in _GUARD.finditer(text) if not m["escape"]]
    closer = _closers(tokens)
    spans = []
    at = 0
    while at < len(tokens):
        end = closer[at]
        if end is None:
            at += 1
            continue
        spans.append((tokens[at].start(), tokens[end].end()))
        at = end + 1
    return spans


def _closers(tokens: list[re.Match[str]]) -> list[int | None]:
    """For each delimiter the index of the one that closes it, None where nothing does. One backward pass."""
    closer: list[int | None] = [None] * len(tokens)
    fences: dict[tuple[str, int], int] = {}  # (character, at least this long) -> next closing fence
    dollars: int | None = None
    right: int | None = None
    ends: dict[str, list[int]] = {}  # environment name -> \end tokens not yet taken
    for at in range(len(tokens) - 1, -1, -1):
        token = tokens[at]
        if fence := token["fence"]:
            length = min(len(fence), _MAX_FENCE)
            if fence[0] == "~" or "`" not in token["info"]:
                closer[at] = fences.get((fence[0], length))
            if not token["info"].strip():
                fences.update({(fence[0], shorter): at for shorter in range(3, length + 1)})
        elif token["dollars"]:
            if dollars is not None and tokens[dollars].end() - token.start() <= MATH_SPAN:
                closer[at] = dollars
            dollars = at
        elif token["left"]:
            if right is not None and tokens[right].end() - token.start() <= MATH_SPAN:
                closer[at] = right
        elif token["right"]:
            right = at
        elif token["edge"] == "end":
            ends.setdefault(token["name"], []).append(at)
        elif token["edge"] == "begin" and ends.get(token["name"]):
            closer[at] = ends[token["name"]].pop()
    return closer
