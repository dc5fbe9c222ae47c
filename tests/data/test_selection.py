"""The (tau, rho) family and its siblings: hand-computed selections, rounding, nesting."""

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_reason.data.condensation.selection import (
    BY_THOUGHT,
    budget_count,
    edge_counts,
    edge_strategy,
    exact,
    kept_count,
    last_first,
    least_kept,
    taking_order,
)

TAUS = st.floats(0.001, 1.0)
RHOS = st.floats(0.0, 1.0)


def chosen(total, kept, strategy, **options):
    return sorted(taking_order(total, strategy, **options)[:kept])


@pytest.mark.parametrize(
    ("total", "tau", "least", "kept"),
    [
        (10, 0.5, 2, 5),
        (11, 0.5, 2, 6),  # ceil(5.5)
        (10, 0.1, 1, 1),  # 0.1 * 10 is 1, whatever the floats say
        (10, 0.3, 1, 3),  # 0.3 * 10 = 3.0000000000000004 in some orders of arithmetic
        (10, 0.1 + 0.2, 1, 3),
        (100, 0.07, 1, 7),  # 0.07 * 100 = 7.000000000000001
        (100, 0.29, 1, 29),
        (3, 1 / 3, 1, 1),
        (3, 2 / 3, 1, 2),
        (10, 0.01, 2, 2),  # k_min
        (10, 0.01, 1, 1),
        (1, 0.5, 2, 1),  # never more than there are
        (0, 0.5, 2, 0),
        (7, 1.0, 2, 7),
    ],
)
def test_kept_count_by_hand(total, tau, least, kept):
    assert kept_count(total, tau, least) == kept


@given(st.integers(1, 400), st.integers(1, 1000))
def test_kept_count_is_the_ceiling_of_the_decimal(total, thousandths):
    assert kept_count(total, thousandths / 1000) == max(-(-thousandths * total // 1000), 1)


@given(st.integers(1, 1000), st.integers(1, 1000))
def test_a_share_of_counts_gives_the_count_back(kept, total):
    if kept <= total:
        assert kept_count(total, kept / total) == kept
        assert kept_count(total, Fraction(kept, total)) == kept


@pytest.mark.parametrize(
    ("kept", "rho", "edges"),
    [
        (5, 0.5, (3, 2)),  # an odd thought goes to the head
        (4, 0.5, (2, 2)),
        (2, 0.5, (1, 1)),
        (5, 0.0, (5, 0)),
        (5, 1.0, (0, 5)),
        (10, 0.3, (7, 3)),
        (100, 0.29, (71, 29)),  # 0.29 * 100 = 28.999999999999996
        (5, 0.25, (4, 1)),
    ],
)
def test_edge_counts_by_hand(kept, rho, edges):
    assert edge_counts(kept, rho) == edges


@given(st.integers(2, 500), RHOS)
def test_edges_add_up(kept, rho):
    head, tail = edge_counts(kept, rho)
    assert head + tail == kept and head >= 0 and tail >= 0
    assert min(edge_counts(kept, 0.5)) >= 1


@pytest.mark.parametrize(
    ("strategy", "kept", "indices"),
    [
        ("epic", 2, [0, 6]),
        ("epic", 3, [0, 1, 6]),
        ("epic", 4, [0, 1, 5, 6]),
        ("head", 3, [0, 1, 2]),
        ("tail", 3, [4, 5, 6]),
        ("middle", 3, [2, 3, 4]),  # start (7 - 3) // 2
        ("middle", 4, [1, 2, 3, 4]),
        ("middle", 1, [3]),
    ],
)
def test_selections_of_seven_thoughts(strategy, kept, indices):
    assert chosen(7, kept, strategy) == indices


@given(st.integers(1, 60), st.data(), RHOS)
def test_epic_keeps_its_two_edges_at_every_count(total, data, rho):
    kept = data.draw(st.integers(1, total))
    head, tail = edge_counts(kept, rho)
    assert chosen(total, kept, "epic", rho=rho) == [*range(head), *range(total - tail, total)]


@given(st.integers(1, 60), st.data())
def test_middle_is_centred_at_every_count(total, data):
    kept = data.draw(st.integers(1, total))
    start = (total - kept) // 2
    assert chosen(total, kept, "middle") == list(range(start, start + kept))


@given(st.integers(0, 60), st.sampled_from(BY_THOUGHT), RHOS, st.integers(0, 5))
def test_every_order_is_a_permutation(total, strategy, rho, protect):
    order = taking_order(total, strategy, rho=rho, row_id="r")
    assert sorted(order) == list(range(total))
    assert sorted(last_first(order, protect)) == list(range(total))


def test_an_unknown_strategy_has_no_order():
    with pytest.raises(ValueError, match="token"):
        taking_order(3, "token")


@given(st.integers(1, 40), st.sampled_from(["tail", "epic"]))
def test_protecting_the_last_thought_changes_nothing_where_it_stays_anyway(total, strategy):
    for kept in range(least_kept(strategy, 1), total + 1):
        order = taking_order(total, strategy)
        assert sorted(last_first(order, 1)[:kept]) == sorted(order[:kept])


def test_a_protected_end_is_taken_first():
    assert sorted(last_first(taking_order(7, "head"), 1)[:3]) == [0, 1, 6]
    assert sorted(last_first(taking_order(7, "middle"), 2)[:3]) == [3, 5, 6]
    assert last_first([0, 1], 5) == [1, 0]


def test_random_depends_on_seed_and_row_alone():
    first = taking_order(30, "random", seed=1, row_id="a:7")
    taking_order(30, "random", seed=1, row_id="b:7")
    assert taking_order(30, "random", seed=1, row_id="a:7") == first
    assert taking_order(30, "random", seed=1, row_id="a:8") != first
    assert taking_order(30, "random", seed=2, row_id="a:7") != first
    # Written down once: the draw must not change between versions or machines.
    assert taking_order(8, "random", seed=0, row_id="x.jsonl:1") == RANDOM_OF_X


RANDOM_OF_X = [2, 3, 5, 0, 1, 7, 4, 6]


def test_random_draws_uniformly():
    counts = [0] * 6
    for row in range(3000):
        for index in taking_order(6, "random", row_id=str(row))[:3]:
            counts[index] += 1
    # Each is drawn with probability 1/2: mean 1500, standard deviation 27.
    assert all(abs(count - 1500) < 5 * 27.4 for count in counts)


@pytest.mark.parametrize(
    ("strategy", "rho", "named", "least", "protected"),
    [
        ("epic", 0.5, "epic", 2, 2),
        ("epic", 0.25, "epic", 2, 2),
        ("epic", 0.0, "head", 1, 2),
        ("epic", 1.0, "tail", 1, 1),
        ("random", 0.5, "random", 1, 2),
        ("tail", 0.0, "tail", 1, 1),
    ],
)
def test_names_and_smallest_counts(strategy, rho, named, least, protected):
    assert edge_strategy(strategy, rho) == named
    assert least_kept(named) == least
    assert least_kept(named, 1) == protected
    assert least_kept(named, 3) == (3 if named == "tail" else 4)


@pytest.mark.parametrize(
    ("tau", "kept"),
    [
        (0.5, 3),  # 30 of 60: 10 (first) + 5 (last) + 15 (second) = 30, not over
        (0.49, 2),
        (1.0, 5),
        (0.25, 2),  # 15
        (0.24, 2),  # 15 is over 14.4, but two stay at least
    ],
)
def test_token_budget_alternates_from_head_and_tail(tau, kept):
    sizes = [10, 15, 20, 10, 5]
    order = taking_order(5, "epic")
    assert order == [0, 4, 1, 3, 2]
    assert budget_count(order, sizes, tau, least_kept("epic")) == kept


def test_token_budget_leans_to_the_end_with_rho():
    sizes = [10] * 10
    order = taking_order(10, "epic", rho=0.75)
    kept = budget_count(order, sizes, 0.4)
    assert sorted(order[:kept]) == [0, 7, 8, 9]


def test_a_huge_thought_ends_the_budget():
    order = taking_order(4, "head")
    assert budget_count(order, [1, 100, 1, 1], 0.5, 1) == 1
    assert budget_count(order, [100, 1, 1, 1], 0.5, 1) == 1  # k_min
    assert budget_count([], [], 0.5, 1) == 0


@given(st.lists(st.integers(0, 50), min_size=1, max_size=30), TAUS, st.sampled_from(BY_THOUGHT))
def test_token_budget_is_used_and_not_exceeded(sizes, tau, strategy):
    order = taking_order(len(sizes), strategy, row_id="r")
    kept = budget_count(order, sizes, tau)
    budget = exact(tau) * sum(sizes)
    assert kept == 1 or sum(sizes[i] for i in order[:kept]) <= budget
    if kept < len(order):
        assert sum(sizes[i] for i in order[: kept + 1]) > budget


def test_exact_reads_decimals():
    assert exact(0.1) == Fraction(1, 10)
    assert exact(Fraction(1, 7)) == Fraction(1, 7)
    assert math.isclose(exact(0.123456), 0.123456)
