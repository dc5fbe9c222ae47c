import pytest
from html_page import Page
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_reason.core.plots import Curve, line_plot
from lit_reason.core.report import (
    Interval,
    Passage,
    Piece,
    ReportData,
    Sample,
    Section,
    Table,
    Tile,
    clip,
    comparison_table,
    count,
    duration,
    render_comparison,
    render_report,
    share,
)

HOSTILE = "</div><script>alert(1)</script><img src=http://x onerror=alert(1)>\"'&amp;{{ 7*7 }}{% x %}"


def everything(text):
    """A page with `text` in every place that takes text."""
    figure = line_plot(text, [Curve(text, [(0, 1.0), (1, 2.0)])], unit=text, note=text, x_label=text)
    table = Table((text, text), [(text, None), (text, Interval(0.5, 0.4, 0.6)), (1, 2.5)], text, text)
    sample = Sample(text, text, True, text, text)
    passage = Passage(text, (text,), [Piece(text, text)], (text,))
    section = Section(text, text, [figure], [table], [sample], [passage], text)
    return ReportData(
        text, (text,), "failed", text, text, [Tile(text, text, text)], [section], text
    )  # fmt: skip


def test_hostile_text_is_shown_and_never_becomes_markup():
    page = Page(render_report(everything(HOSTILE)))
    assert page.text.count("<script>alert(1)</script>") > 12
    assert "49" not in page.text


@settings(max_examples=40, deadline=None)
@given(st.text(max_size=80))
def test_any_text_gives_a_sound_page(text):
    page = render_report(everything(text))
    assert Page(page)
    page.encode("utf-8")


def test_text_that_utf8_cannot_hold_is_marked():
    page = render_report(ReportData("a\ud800b\x00c\x1b[31m"))
    page.encode("utf-8")
    assert "a\ufffdb\ufffdc\ufffd[31m" in page


def test_empty_sections_and_missing_parts_leave_nothing_behind():
    page = Page(render_report(ReportData("only a title", sections=[Section("empty", "note")])))
    assert page.text == "only a title\nonly a title"  # once in the window, once on the page
    assert not page.having("status") and not page.having("alarm")


def test_links_lead_to_the_sections_in_their_order():
    sections = [Section(name, text="x", folded=name == "c") for name in "abc"]
    page = Page(render_report(ReportData("t", sections=[*sections[:1], Section("void"), *sections[1:]])))
    assert [a["href"] for t, a in page.tags if t == "a"] == ["#s1", "#s2", "#s3"]
    assert [(t, a["id"]) for t, a in page.tags if "id" in a] == [
        ("section", "s1"),
        ("section", "s2"),
        ("details", "s3"),
    ]


def test_the_page_asks_the_browser_to_load_nothing():
    page = Page(render_report(ReportData("t")))
    (policy,) = [a["content"] for t, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"


def test_samples_tell_right_from_wrong_in_words_and_colour():
    samples = [Sample("q", "a", right) for right in (True, False, None)]
    page = Page(render_report(ReportData("t", sections=[Section("s", samples=samples)])))
    assert [page.having(style) for style in ("right", "wrong", "unchecked")] == [["article"]] * 3
    assert [page.text.count(word) for word in ("✓ right", "✗ wrong", "not checked")] == [1, 1, 1]


def test_an_interval_is_placed_on_its_bar():
    interval = Interval(0.62, 0.522, 0.709)
    assert (interval.left, interval.width, interval.at) == ("52.2", "18.7", "62.0")
    assert interval.text == "62\u00a0%, interval 52 to 71"
    beyond = Interval(1.0, -0.1, 1.2)
    assert (beyond.left, beyond.width, beyond.at) == ("0.0", "100.0", "100.0")


def test_comparison_shows_each_arm_with_known_and_own_columns():
    rows = [
        {"name": "full", "accuracy": 0.5, "accuracy_low": 0.4, "accuracy_high": 0.6, "trained_tokens": 1_204_551,
         "seconds": 163.0, "time_saved": 0.0, "rows_left": 1200},
        {"name": "epic", "accuracy": 0.25, "seconds": 98.2, "time_saved": 0.3975, "p_value": 0.123456},
    ]  # fmt: skip
    table = comparison_table(rows)
    heads = ["arm", "accuracy (interval)", "trained tokens", "training time", "time saved", "rows left", "p value"]
    assert table.columns == heads
    nbsp = "\u00a0"
    assert table.rows[0] == ["full", Interval(0.5, 0.4, 0.6), "1,204,551", f"2{nbsp}min{nbsp}43{nbsp}s",
                             f"0{nbsp}%", "1,200", None]  # fmt: skip
    assert table.rows[1] == ["epic", f"25{nbsp}%", None, f"1{nbsp}min{nbsp}38{nbsp}s",
                             f"39.8{nbsp}%", None, "0.1235"]  # fmt: skip


def test_comparison_page_holds_rows_curves_and_notes():
    rows = [{"name": HOSTILE, "accuracy": 0.5, "accuracy_low": 0.4, "accuracy_high": 0.6}]
    text = render_comparison("Arms", rows, {HOSTILE: [(0, 2.0), (1, 1.0)], "none": []}, ["first", "second"])
    page = Page(text)
    assert page.having("range") == ["span"] and text.count("<svg") == 1
    assert "first" in page.text and "second" in page.text
    assert Page(render_comparison("No arms", []))


@pytest.mark.parametrize(
    ("shown", "text"),
    [
        (duration(0.8412), "0.841 s"),
        (duration(59.94), "59.9 s"),
        (duration(59.96), "1 min 00 s"),
        (duration(3599.6), "1 h 00 min"),
        (duration(7512), "2 h 05 min"),
        (count(41_203), "41,203"),
        (count(3_418_000), "3.42 M"),
        (count(812.4), "812"),
        (share(0.6249), "62.5 %"),
    ],
)
def test_numbers_for_readers(shown, text):
    assert shown == text.replace(" ", "\u00a0")


def test_clip_keeps_both_ends_and_says_how_much_is_missing():
    text = "".join(chr(0x4E00 + i) for i in range(1000))
    short = clip(text, 300)
    head, middle, tail = short.split("\n")
    assert (head, tail) == (text[:200], text[-100:]) and "700 characters" in middle
    assert clip("abc", 3) == "abc"
