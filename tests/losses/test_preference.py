"""Preference losses against their definitions, and their gradients against closed forms and differences."""

import math

import pytest
import torch

from lit_reason.errors import UserError
from lit_reason.losses.preference import check_beta, margin_loss, npo_loss, pair_loss, sequence_sums, simnpo_loss

RATIOS = torch.tensor([-30.0, -2.5, 0.0, 0.7, 12.0], dtype=torch.float64)


def gradient(loss, at: torch.Tensor) -> torch.Tensor:
    at = at.clone().requires_grad_()
    (found,) = torch.autograd.grad(loss(at).sum(), at)
    return found


def test_shapes_are_those_of_the_definitions():
    m = RATIOS
    torch.testing.assert_close(margin_loss(m, "sigmoid"), torch.log1p(torch.exp(-m)))
    torch.testing.assert_close(margin_loss(m, "hinge"), torch.stack([max(x * 0, 1 - x) for x in m]))
    torch.testing.assert_close(margin_loss(m, "linear"), -m)


def test_sigmoid_stays_finite_where_the_naive_form_does_not():
    far = torch.tensor([-1e4, 1e4])
    assert margin_loss(far).tolist() == [1e4, 0.0]


@pytest.mark.parametrize("shape", ["sigmoid", "hinge", "linear"])
def test_pair_loss_falls_with_the_chosen_and_rises_with_the_rejected(shape):
    chosen, rejected = torch.tensor([0.3]), torch.tensor([-0.2])
    assert gradient(lambda c: pair_loss(c, rejected, beta=0.5, shape=shape), chosen) < 0
    assert gradient(lambda r: pair_loss(chosen, r, beta=0.5, shape=shape), rejected) > 0
    expected = margin_loss(torch.tensor([0.25]), shape)
    torch.testing.assert_close(pair_loss(chosen, rejected, beta=0.5, shape=shape), expected)


def test_dpo_at_the_reference_is_log_two_with_half_the_slope():
    zero = torch.zeros(1, dtype=torch.float64)
    assert pair_loss(zero, zero, beta=0.1).item() == pytest.approx(math.log(2))
    assert gradient(lambda c: pair_loss(c, zero, beta=0.1), zero).item() == pytest.approx(-0.05)


@pytest.mark.parametrize("beta", [0.05, 0.1, 1.0])
def test_npo_at_the_reference_has_the_gradient_of_ascent(beta):
    zero = torch.zeros(1, dtype=torch.float64)
    assert npo_loss(zero, beta=beta).item() == pytest.approx(2 / beta * math.log(2))
    assert gradient(lambda r: npo_loss(r, beta=beta), zero).item() == pytest.approx(1.0)


def test_npo_gradient_is_the_weight_of_the_paper_everywhere():
    beta = 0.3
    p_beta = torch.exp(beta * RATIOS)  # (p / p_ref)^beta
    torch.testing.assert_close(gradient(lambda r: npo_loss(r, beta=beta), RATIOS), 2 * p_beta / (p_beta + 1))


def test_npo_tends_to_ascent_for_small_beta_and_vanishes_for_forgotten_answers():
    assert gradient(lambda r: npo_loss(r, beta=1e-6), RATIOS).tolist() == pytest.approx([1.0] * 5, abs=1e-4)
    assert gradient(lambda r: npo_loss(r, beta=0.1), torch.tensor([-400.0])).item() < 1e-15


def test_simnpo_is_npo_of_the_mean_with_a_margin():
    mean = torch.tensor([-0.4, -3.0], dtype=torch.float64)
    naive = -(2 / 4.5) * torch.log(torch.sigmoid(-4.5 * mean - 0.2))
    torch.testing.assert_close(simnpo_loss(mean, beta=4.5, margin=0.2), naive)
    torch.testing.assert_close(simnpo_loss(mean, beta=4.5), npo_loss(mean, beta=4.5))


def test_sums_of_a_pack_and_their_gradient():
    values = torch.tensor([1.0, 2.0, 4.0, 8.0], requires_grad=True)
    sums = sequence_sums(values, torch.tensor([0, 2, 0, 2]), 3)
    assert sums.tolist() == [5.0, 0.0, 10.0]
    (sums * torch.tensor([1.0, 10.0, 100.0])).sum().backward()
    assert values.grad.tolist() == [1.0, 100.0, 1.0, 100.0]


def test_a_misspelt_shape_is_named():
    with pytest.raises(UserError, match="did you mean 'hinge'"):
        margin_loss(RATIOS, "hinges")


@pytest.mark.parametrize("beta", [0.0, -1.0, math.nan, math.inf])
def test_a_useless_beta_is_refused(beta):
    with pytest.raises(UserError, match=r"loss\.beta is"):
        check_beta("loss.beta", beta)
