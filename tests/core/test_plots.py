import re
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_reason.core.plots import MOST_POINTS, Curve, Key, bar_plot, line_plot, running_mean, short, simplex_plot, thin


def parsed(figure):
    return ElementTree.fromstring(str(figure.svg))


def test_colours_follow_the_page_and_nothing_is_loaded():
    figure = line_plot("Loss", [Curve("a", [(0, 1.0), (5, 2.0)], "c3"), Curve("b", [(0, 1.0)], "c2")])
    svg = str(figure.svg)
    parsed(figure)
    assert "var(--c3)" in svg and "var(--c2)" in svg and "var(--muted)" in svg
    assert not re.search(r"#[0-9a-fA-F]{6}\b|http|xmlns|<style|font-family", svg)


def test_ids_are_unique_within_a_plot_and_across_plots():
    first = line_plot("A", [Curve("a", [(0, 1.0), (1, 2.0)], markers=True)])
    second = line_plot("B", [Curve("a", [(0, 1.0), (1, 2.0)], markers=True)])
    ids = [re.findall(r'\bid="([^"]*)"', str(f.svg)) for f in (first, second)]
    assert len(set(ids[0] + ids[1])) == len(ids[0]) + len(ids[1])
    used = re.findall(r'(?:url\(|href=")#([^")]*)', str(first.svg))
    assert used and set(used) <= set(ids[0])


def test_the_same_plot_gives_the_same_text():
    curves = [Curve("a", [(0, 1.0), (1, 2.0)], band=[(0, 0.5, 1.5), (1, 1.0, 3.0)])]
    assert line_plot("A", curves) == line_plot("A", curves)


def test_legend_names_each_drawn_curve_with_its_newest_value():
    noisy = Curve("noisy", [(i, 1.0 if i % 2 else 3.0) for i in range(240)], "c1", smooth=True)
    curves = [noisy, Curve("few", [(0, 0.5), (9, 0.25)], "c2"), Curve("absent", [])]
    assert line_plot("A", curves).legend == (Key("noisy", "c1", "2"), Key("few", "c2", "0.25"))
    assert line_plot("A", curves[1:], percent=True).legend == (Key("few", "c2", "25%"),)


def test_nothing_to_draw_is_no_plot():
    assert line_plot("A", []) is None
    assert line_plot("A", [Curve("a", [])]) is None
    assert bar_plot("A", ["x"], [("g", "c1", [None])]) is None


def test_bars_are_drawn_for_values_alone():
    figure = bar_plot("A", ["x", "y"], [("old", "c8", [1.0, None]), ("new", "c1", [None, None])])
    assert figure.legend == (Key("old", "c8"),)
    assert str(figure.svg).count("fill: var(--c8)") == 1


@pytest.mark.filterwarnings("error")
def test_scripts_that_the_plot_library_has_no_font_for_stay_text():
    figure = bar_plot("数学 🙂", ["前半", "\U0001f642", "ไทย"], [("g", "c1", [1.0, 2.0, 3.0])], x_label="部分")
    assert all(name in str(figure.svg) for name in ("前半", "\U0001f642", "ไทย", "部分"))


def test_hostile_names_stay_text():
    names = ["<script>x</script>", "$\\frac{$", "]]>", "a -- b"]
    figure = bar_plot('"><script>', names, [("g", "c1", [1.0, 2.0, 3.0, 4.0])])
    root = parsed(figure)
    assert root.attrib["aria-label"] == '"><script>'
    assert not [e for e in root.iter() if e.tag.lower() == "script"]
    texts = {"".join(e.itertext()) for e in root.iter("text")}
    assert set(names) <= texts


def test_running_mean_by_hand():
    points = [(0, 0.0), (1, 3.0), (2, 6.0), (3, 0.0)]
    assert running_mean(points, 1) == [(0, 1.5), (1, 3.0), (2, 3.0), (3, 3.0)]
    assert running_mean(points, 0) == points


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=2000))
def test_thinning_keeps_few_points_the_last_one_and_the_range(values):
    points = list(enumerate(values))
    few = thin(points)
    assert len(few) <= MOST_POINTS + 1
    assert few[-1] == points[-1]
    assert [x for x, _ in few] == sorted({x for x, _ in few})
    assert all(min(values) - 1e-6 <= y <= max(values) + 1e-6 for _, y in few)
    assert few == points if len(points) <= MOST_POINTS else len(few) > MOST_POINTS // 3


@settings(max_examples=15, deadline=None)
@given(st.lists(st.floats(-1e30, 1e30), min_size=1, max_size=60), st.booleans(), st.booleans())
def test_any_finite_curve_draws(values, smooth, from_zero):
    parsed(line_plot("A", [Curve("a", list(enumerate(values)), smooth=smooth)], from_zero=from_zero))


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.00412, "0.00412"), (1.2345, "1.23"), (940, "940"), (-3, "-3"), (9999, "9999"), (12_500, "12.5k"),
     (3_240_000, "3.24M"), (5e9, "5G"), (1e30, "1e+30")],
)  # fmt: skip
def test_short_numbers(value, text):
    assert short(value) == text


@pytest.mark.parametrize(("xs", "fractions"), [([0.0, 0.25, 0.5, 1.0], True), ([0.0, 1.0, 2.0, 3.0], False)])
def test_the_horizontal_axis_has_fractions_where_the_points_have(xs, fractions):
    figure = line_plot("p", [Curve("a", [(x, 10.0) for x in xs])], from_zero=True)
    ticks = [float(tick) for tick in re.findall(r">([\d.]+)</text>", figure.svg)]
    below = [tick for tick in ticks if 0 < tick < 1]
    assert bool(below) == fractions, ticks


def test_the_legend_of_a_field_has_the_colours_of_its_lowest_and_highest_value():
    field = [((1, 0, 0), -2.0), ((0, 1, 0), 1.0), ((0, 0, 1), 5.0)]
    figure = simplex_plot("A", ("x", "y", "z"), field, [((0.3, 0.3, 0.4), "1")])
    drawn = re.findall(r"fill: var\(--c1\);[^\"]*opacity: ([\d.]+)", figure.svg)
    low, high = figure.legend
    assert (low.label, low.value, high.label, high.value) == ("lowest", "-2", "highest", "5")
    assert low.colour == high.colour == "c1"
    assert [float(drawn[0]), float(drawn[-1])] == [low.strength, high.strength]
