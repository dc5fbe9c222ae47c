"""Segmenters: exact cuts, guards, losslessness on any text, linear time on hostile text, and stages."""

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_reason.data.condensation.thoughts import (
    MATH_SPAN,
    giant,
    guarded_spans,
    segment,
    sentences,
    split_giant,
    stage,
)
from lit_reason.data.token_row import Segment
from lit_reason.errors import UserError

MODES = ("paragraph", "cue", "paragraph+cue")
BITS = [
    "\n", "\n\n", "\r\n\r\n", " ", "\t", "Wait, ", "but ", "However. ", "So it is 3. ", "a long enough paragraph",
    "```", "```python\n", "\n```\n", "~~~~\n", "$$", "\\[", "\\]", "\\\\", "\\begin{align}", "\\end{align}", "1. ",
    "e.g. ", "…", "é\u2028", "\x0b", "",
]  # fmt: skip
TRACES = st.lists(st.one_of(st.sampled_from(BITS), st.text(max_size=8)), max_size=30).map("".join)


def test_paragraphs_keep_their_separators():
    text = "first paragraph here\n\nsecond paragraph here\n \t\n\n  indented third one\nsame one\n"
    assert segment(text) == [
        "first paragraph here\n\n",
        "second paragraph here\n \t\n\n",
        "  indented third one\nsame one\n",
    ]


def test_windows_line_ends_and_leading_blank_lines():
    assert segment("\n\nfirst paragraph here\r\n\r\nsecond paragraph here") == [
        "\n\nfirst paragraph here\r\n\r\n",
        "second paragraph here",
    ]
    assert segment("") == []
    assert segment(" \n\n ") == [" \n\n "]


def test_a_short_fragment_joins_the_thought_before_it():
    text = "a paragraph of some length\n\nHm.\n\nOk.\n\nanother paragraph of length\n\nend"
    assert segment(text) == [
        "a paragraph of some length\n\nHm.\n\nOk.\n\n",
        "another paragraph of length\n\nend",
    ]
    assert len(segment(text, min_chars=0)) == 5
    assert segment("Hm.\n\na paragraph of some length") == ["Hm.\n\n", "a paragraph of some length"]
    assert len(segment("sixteen chars 16\n\n" * 2)) == 2  # exactly min_chars is long enough
    assert len(segment("fifteen chars 5\n\n" * 2)) == 1


def test_cues_start_thoughts_at_paragraphs_lines_and_sentences():
    text = "Let me see. Wait, no. I but try. however it is\n  But. Butter is fine\n\nhmm okay"
    assert segment(text, "cue") == [
        "Let me see. ",
        "Wait, no. I but try. ",
        "however it is\n",
        "  But. Butter is fine\n\n",
        "hmm okay",
    ]


def test_paragraphs_merge_until_the_next_cue():
    text = (
        "the first paragraph\n\nstill the first line\n\nthe second paragraph\n\nWait, a third one here\n\nits follow-up"
    )
    assert segment(text, "paragraph+cue") == [
        "the first paragraph\n\n",
        "still the first line\n\nthe second paragraph\n\n",
        "Wait, a third one here\n\nits follow-up",
    ]


def test_regex_and_its_errors():
    assert segment("a|b||c", "regex", pattern=re.compile(r"\|")) == ["a|", "b|", "|", "c"]
    assert segment("Step 1 x Step 2 y", "regex", pattern=re.compile(r"(?=Step)")) == ["Step 1 x ", "Step 2 y"]
    with pytest.raises(UserError, match="pattern"):
        segment("a", "regex")
    with pytest.raises(UserError, match="list of thoughts"):
        segment("a", "presplit")


@pytest.mark.parametrize(
    "guarded",
    [
        "```python\na = 1\n\nWait, b = 2\n```",
        "~~~\ncode\n\n```\nmore code\n~~~~",
        "$$\nx\n\nBut. y\n$$",
        "\\[\nx\n\ny \\\\[2pt] z\n\\]",
        "\\begin{align}\nx\n\n\\begin{align}\ny\n\n\\end{align}\n\nz\n\\end{align}",
        "   ```\n\nindented fence\n\n   ```",
    ],
)
@pytest.mark.parametrize("mode", MODES)
def test_no_cut_falls_inside_a_guard(guarded, mode):
    text = f"a paragraph before it\n\n{guarded}\n\nHowever, a paragraph after it"
    thoughts = segment(text, mode)
    assert any(guarded in thought for thought in thoughts)
    assert thoughts[-1] == "However, a paragraph after it"
    assert guarded_spans(text) == [(text.index(guarded), text.index(guarded) + len(guarded))]


def test_a_guarded_block_may_start_and_end_a_thought():
    text = "a paragraph before it\n\n```\ncode\n```\n\na paragraph after it"
    assert segment(text, min_chars=0) == [
        "a paragraph before it\n\n", "```\ncode\n```\n\n", "a paragraph after it",
    ]  # fmt: skip


def test_a_latex_row_end_opens_no_display():
    assert guarded_spans("x \\\\[2pt] y\n\nz \\] w") == []


@pytest.mark.parametrize("stray", ["```", "$$", "\\[", "\\]", "\\begin{x}", "\\end{x}", "```a`b\n```a"])
def test_a_delimiter_that_is_not_closed_guards_nothing(stray):
    text = f"{stray}\na first paragraph\n\na second paragraph\n\na third paragraph"
    assert len(segment(text)) == 3


def test_stray_dollars_do_not_swallow_the_trace():
    far = "a paragraph of text\n\n" * (MATH_SPAN // 20 + 1)
    text = f"it costs $$5\n\n{far}and $$7 there"
    assert guarded_spans(text) == []


@given(TRACES, st.sampled_from(MODES), st.integers(0, 20))
def test_thoughts_laid_end_to_end_are_the_trace(text, mode, min_chars):
    thoughts = segment(text, mode, min_chars=min_chars)
    assert "".join(thoughts) == text
    assert all(thoughts)
    assert all(thought.strip() for thought in thoughts) or len(thoughts) == 1
    inside = set()
    for start, end in guarded_spans(text):
        inside.update(range(start + 1, end))
    cuts, at = set(), 0
    for thought in thoughts[:-1]:
        at += len(thought)
        cuts.add(at)
    assert not cuts & inside


@given(TRACES, st.sampled_from([r"\n", r"x*", r"(?=a)", r"\s+"]))
def test_regex_segmentation_loses_nothing(text, pattern):
    thoughts = segment(text, "regex", pattern=re.compile(pattern))
    assert "".join(thoughts) == text and all(thoughts)


@given(TRACES)
def test_sentences_lose_nothing(text):
    assert "".join(sentences(text)) == text


def test_sentences_by_hand():
    text = 'It is 3.5 at first. "Is it so?" Yes it is, e.g. this one.\n1. First item goes here\nDone at last now!'
    assert sentences(text) == [
        'It is 3.5 at first. "Is it so?" ',  # the question alone is shorter than 16 characters
        "Yes it is, e.g. this one.\n",
        "1. First item goes here\n",
        "Done at last now!",
    ]
    assert len(sentences(text, min_chars=0)) == 5


def test_a_giant_thought_is_cut_into_sentences():
    thoughts = ["a small one\n\n", "One sentence is here. Another one is here. A third one is here.", "small"]
    assert giant([10, 81, 70]) == 1
    assert giant([10, 80, 70]) is None  # exactly half is not over half
    assert split_giant(thoughts, [10, 80, 70]) == thoughts
    cut = split_giant(thoughts, [3, 15, 1])
    assert cut == [
        thoughts[0], "One sentence is here. ", "Another one is here. ", "A third one is here.", "small",
    ]  # fmt: skip
    assert giant([]) is None


def _edges_of_the_paper(total):
    kept = min(max((total + 1) // 2, 2), total)
    return kept - kept // 2, kept // 2


@pytest.mark.parametrize("total", range(2, 40))
def test_stages_are_the_edges_of_epic_at_one_half(total):
    head, tail = _edges_of_the_paper(total)
    names = [stage(i, total) for i in range(total)]
    assert names == (
        [Segment.UNDERSTANDING] * head + [Segment.EXPLORATION] * (total - head - tail) + [Segment.CONVERGENCE] * tail
    )


def test_stage_of_tiny_traces():
    assert stage(0, 1) == Segment.CONVERGENCE
    assert [stage(i, 2) for i in range(2)] == [Segment.UNDERSTANDING, Segment.CONVERGENCE]
    assert [stage(i, 5).name[0] for i in range(5)] == list("UUEEC")


HOSTILE = {
    "spaces": " " * 40,
    "line breaks": "\n" * 40,
    "blank lines": "\n \n\t",
    "short paragraphs": "a\n\n",
    "dots and quotes": ".\"'",
    "dots": ". ",
    "one dot, quotes": '""""',
    "fences": "\n```\n",
    "fence openers": "\n```x",
    "longer fences": "\n~~~~x\n```",
    "dollars": "$$ ",
    "left brackets": "\\[ ",
    "begins": "\\begin{a}",
    "ends": "\\end{a}\\begin{b}",
    "cues": "wait wait, ",
    "cue lines": "\n   but ",
    "numbers": "1. ",
    "stars": "\n*** 1. ",
}


# The work of a regular expression cannot be counted, so its processor time is: linear work on these texts takes a
# fraction of a second, quadratic work (4 * 10^10 steps) minutes. The limit lies far from both.
LIMIT_S = 30


def cpu_seconds(unit, size, cut):
    text = "x." + unit * (size // len(unit)) + "\n  y"
    began = time.process_time()
    assert "".join(cut(text)) == text
    return time.process_time() - began


@pytest.mark.parametrize("unit", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_text_takes_no_quadratic_work(unit):
    assert cpu_seconds(unit, 200_000, sentences) < LIMIT_S
    assert cpu_seconds(unit, 200_000, lambda text: segment(text, "cue")) < LIMIT_S
    assert cpu_seconds(unit, 200_000, lambda text: segment(text, "paragraph+cue")) < LIMIT_S


@pytest.mark.slow
@pytest.mark.parametrize("unit", HOSTILE.values(), ids=HOSTILE.keys())
def test_ten_megabytes_of_hostile_text(unit):
    text = "x." + unit * (10_000_000 // len(unit)) + "\n  y"
    assert "".join(segment(text, "paragraph+cue")) == text
