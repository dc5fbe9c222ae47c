"""Think markers: every case of the table, and texts that quote, nest or forget them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_reason.data.condensation.markers import MARKERS, split_trace

OPEN, CLOSE = MARKERS[0]
FRAGMENTS = st.lists(
    st.one_of(st.sampled_from([m for pair in MARKERS for m in pair]), st.text(max_size=6)), max_size=12
).map("".join)


def whole(parts):
    return parts.prefix + parts.opening + parts.body + parts.closing + parts.rest


@pytest.mark.parametrize("pair", MARKERS)
def test_every_pair_of_the_table(pair):
    both = split_trace(f"a{pair.opening}b{pair.closing}c")
    assert (both.prefix, both.opening, both.body, both.closing, both.rest) == ("a", *pair[:1], "b", pair.closing, "c")
    assert both.case == "both"
    closed = split_trace(f"b{pair.closing}c")
    assert (closed.case, closed.opening, closed.body, closed.rest) == ("close_only", "", "b", "c")
    opened = split_trace(f"a{pair.opening}b")
    assert (opened.case, opened.prefix, opened.body, opened.closing, opened.rest) == ("open_only", "a", "b", "", "")


def test_a_text_without_markers_has_no_trace():
    assert split_trace("no thinking < think > here") is None


def test_the_last_closing_marker_ends_the_trace():
    parts = split_trace("<think>the tag </think> ends it, says the prompt</think>\n7")
    assert parts.body == "the tag </think> ends it, says the prompt"
    assert parts.rest == "\n7"
    assert not parts.several


def test_pairs_never_cross():
    parts = split_trace("<think>a</reasoning>b")
    # </reasoning> alone closes a trace; <think> stays text, as nothing closes it.
    assert (parts.case, parts.body, parts.rest) == ("close_only", "<think>a", "b")
    parts = split_trace("<think>a [/THINK] b</think>c")
    assert (parts.body, parts.rest) == ("a [/THINK] b", "c")


def test_the_outer_pair_wins_over_a_quoted_one():
    parts = split_trace("<reasoning>they write <think>x</think></reasoning>y")
    assert (parts.opening, parts.body, parts.rest) == ("<reasoning>", "they write <think>x</think>", "y")


def test_a_complete_pair_wins_over_a_lone_marker():
    assert split_trace("[THINK] <thought>a</thought>b").body == "a"
    assert split_trace("a</think><thought>b</thought>c").body == "b"


def test_an_opening_marker_in_the_solution_opens_nothing():
    parts = split_trace("a</think>write <think> first")
    assert (parts.case, parts.body, parts.rest) == ("close_only", "a", "write <think> first")


def test_nested_and_repeated_traces():
    nested = split_trace("<think>a<think>b</think>c</think>d")
    assert (nested.body, nested.several) == ("a<think>b</think>c", False)
    assert split_trace("<think>a</think> shown <think>b</think>c").several


@given(FRAGMENTS)
def test_no_text_crashes_and_the_parts_are_the_text(text):
    parts = split_trace(text)
    assert (parts is None) == (not any(marker in text for pair in MARKERS for marker in pair))
    if parts is not None:
        assert whole(parts) == text
        assert parts.case in ("both", "close_only", "open_only")
        assert (parts.closing in [p.closing for p in MARKERS]) == (parts.case != "open_only")
        assert parts.closing == "" or parts.closing not in parts.rest
