"""Shapley values: the axioms, an independent enumeration over orders, and the shap and captum packages as oracles."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from games import Interactions, generator

from lit_reason.errors import UserError
from lit_reason.rewards.attribution.shapley import MOST_EXACT, exact, kernel, permutation

ESTIMATORS = {
    "exact": lambda worth, P: exact(worth, P),
    "permutation": lambda worth, P: permutation(worth, P, 100, generator()),
    "kernel": lambda worth, P: kernel(worth, P, 60, generator()),
    "owen": lambda worth, P: permutation(worth, P, 100, generator(), torch.arange(P) // 3),
}


def by_orders(worth, P, orders):
    """Mean marginal contribution over the given orders, one order and one player at a time."""
    found = np.zeros(P)
    for order in orders:
        there = torch.zeros((1, P), dtype=torch.bool)
        before = float(worth(there))
        for player in order:
            there[0, player] = True
            now = float(worth(there))
            found[player] += now - before
            before = now
    return found / len(orders)


@pytest.mark.parametrize("P", [1, 2, 5])
def test_exact_values_are_the_mean_over_all_orders(P):
    game = Interactions(P)
    assert exact(game, P).numpy() == pytest.approx(
        by_orders(game, P, list(itertools.permutations(range(P)))), abs=1e-12
    )


@pytest.mark.parametrize("P", [4, 8, 10])
def test_exact_values_are_those_of_the_shap_package(P):
    shap = pytest.importorskip("shap", reason="the package shap is not installed (it brings numba)")
    game = Interactions(P)
    explain = shap.ExactExplainer(lambda z: game(torch.tensor(z > 0.5)).numpy(), np.zeros((1, P)))
    theirs = explain(np.ones((1, P))).values[0]
    assert exact(game, P).numpy() == pytest.approx(theirs, abs=1e-10)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("P", [1, 2, 7])
def test_efficiency_values_sum_to_what_all_gain_together(estimator, P):
    game = Interactions(P)
    assert float(ESTIMATORS[estimator](game, P).sum()) == pytest.approx(game.gain(), abs=1e-10)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_an_additive_reward_is_found_exactly_and_a_dummy_gets_nothing(estimator):
    game = Interactions(9, pairs=0.0, triples=0.0)
    game.single[4] = 0.0
    found = ESTIMATORS[estimator](game, 9)
    torch.testing.assert_close(found, game.single, rtol=0, atol=1e-10)
    assert abs(float(found[4])) < 1e-10


def test_symmetric_players_get_equal_values():
    weight = torch.tensor([1.0, 2.0, 2.0, -0.5], dtype=torch.float64)  # the middle two are alike
    found = exact(lambda z: (z.double() @ weight) ** 2, 4)
    assert float(found[1]) == pytest.approx(float(found[2]), abs=1e-12) and float(found[0]) != pytest.approx(
        float(found[1])
    )


def test_values_are_linear_in_the_game():
    a, b = Interactions(5, 1), Interactions(5, 2)
    both = exact(lambda z: 2 * a(z) - 3 * b(z), 5)
    torch.testing.assert_close(both, 2 * exact(a, 5) - 3 * exact(b, 5))


def test_kernel_shap_on_all_coalitions_is_exact():
    game = Interactions(6)
    torch.testing.assert_close(kernel(game, 6, 2**6, generator()), exact(game, 6), rtol=0, atol=1e-9)


def test_kernel_shap_on_all_coalitions_is_captums():
    attr = pytest.importorskip("captum.attr", reason="the package captum is not installed")
    game, P = Interactions(5), 5
    torch.manual_seed(0)
    theirs = attr.ShapleyValues(lambda z: game(z > 0.5)).attribute(torch.ones((1, P), dtype=torch.float64))[0]
    torch.testing.assert_close(
        kernel(game, P, 2**P, generator()), theirs.double(), rtol=0, atol=1e-5
    )  # captum adds in float32


@pytest.mark.parametrize("estimator", [kernel, permutation])
def test_estimates_come_closer_with_more_evaluations(estimator):
    game, P = Interactions(10), 10
    true = exact(game, P)

    def error(evaluations):
        return sum(float((estimator(game, P, evaluations, generator(s)) - true).abs().mean()) for s in range(8)) / 8

    few, many = error(40), error(900)
    assert many < 0.5 * few and many < 0.1


def test_antithetic_pairs_get_interactions_of_two_right_at_once():
    """Of two players the second to come gets their interaction, and in the reverse order the other one does."""
    game = Interactions(9, triples=0.0)
    one_pair = permutation(game, 9, 1, generator())
    torch.testing.assert_close(one_pair, exact(game, 9), rtol=0, atol=1e-10)


def test_a_budget_is_kept():
    game, P = Interactions(20), 20
    permutation(game, P, 400, generator())
    assert game.calls <= 400 * (P + 1) / (P - 1)
    game.calls = 0
    kernel(game, P, 400, generator())
    assert 380 <= game.calls <= 402


def test_owen_values_are_the_mean_over_orders_that_keep_blocks_together():
    game, block = Interactions(5, 3), torch.tensor([0, 0, 1, 1, 1])
    orders = [
        [*first, *second]
        for blocks in ([[0, 1], [2, 3, 4]], [[2, 3, 4], [0, 1]])
        for first in itertools.permutations(blocks[0])
        for second in itertools.permutations(blocks[1])
    ]
    true = by_orders(game, 5, orders)
    assert not np.allclose(true, exact(game, 5).numpy(), atol=1e-3)  # the triple across the border tells them apart
    assert permutation(game, 5, 20_000, generator(), block).numpy() == pytest.approx(true, abs=0.02)


def test_too_many_players_for_enumeration_are_refused():
    with pytest.raises(UserError, match="13 players take 2\\^13"):
        exact(Interactions(MOST_EXACT + 1), MOST_EXACT + 1)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_constant_reward_credits_nobody(estimator):
    found = ESTIMATORS[estimator](lambda z: torch.full((len(z),), 3.5, dtype=torch.float64), 6)
    torch.testing.assert_close(found, torch.zeros(6, dtype=torch.float64), rtol=0, atol=1e-12)
