"""LIME: its regression against a plain solver, what it finds, and what its intercept keeps."""

from __future__ import annotations

import pytest
import torch
from games import Interactions, generator

from lit_reason.rewards.attribution.lime import lime, weighted_ridge


def test_the_regression_is_the_minimum_of_its_objective():
    g = generator(3)
    z = torch.rand((40, 5), generator=g, dtype=torch.float64)
    value = torch.randn(40, generator=g, dtype=torch.float64)
    weight = torch.rand(40, generator=g, dtype=torch.float64)
    root = weight.sqrt()[:, None]
    # Rows of the penalty below those of the samples; the last column is the intercept, which has none.
    design = torch.cat([root * torch.cat([z, torch.ones(40, 1).double()], 1), 0.5 * torch.eye(6).double()[:5]])
    aim = torch.cat([root[:, 0] * value, torch.zeros(5).double()])
    expected = torch.linalg.lstsq(design, aim[:, None]).solution[:5, 0]
    torch.testing.assert_close(weighted_ridge(z, value, weight, 0.25), expected)


def test_an_additive_reward_is_found():
    game = Interactions(8, pairs=0.0, triples=0.0)
    torch.testing.assert_close(lime(game, 8, 300, generator(), ridge=1e-9), game.single, rtol=0, atol=1e-6)


def test_it_looks_closer_at_the_whole_response_the_narrower_its_kernel():
    """Around the whole, a player is worth its contribution as the last to come."""
    game, P = Interactions(6, 5), 6
    others = torch.ones((P, P), dtype=torch.bool).fill_diagonal_(False)
    last = game(torch.ones((1, P), dtype=torch.bool)) - game(others)

    def distance(width):
        return float((lime(game, P, 4000, generator(), width=width, ridge=1e-9) - last).abs().mean())

    assert distance(0.05) < 0.5 * distance(5.0)


def test_nothing_makes_its_coefficients_sum_to_the_gain():
    game = Interactions(8, 2)
    assert abs(float(lime(game, 8, 256, generator()).sum()) - game.gain()) > 0.05


def test_no_player_and_one():
    assert lime(Interactions(0), 0, 10, generator()).shape == (0,)
    found = lime(Interactions(1), 1, 10, generator(), width=5.0, ridge=1e-9)
    assert float(found[0]) == pytest.approx(Interactions(1).gain(), abs=1e-6)
