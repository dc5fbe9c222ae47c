"""The table of token losses: each derivative against its closed form, each metric against its definition."""

import math

import pytest
import torch

from lit_reason.errors import UserError
from lit_reason.kernels import epilogues
from lit_reason.kernels.epilogues import Terms, Tokens, derivatives, terms_of
from lit_reason.kernels.head_loss import linear_token_loss

LOGP = torch.tensor([-1e-9, -0.1, -0.5, -1.0, -2.0, -7.0, -0.3, -3.0], dtype=torch.float64)
A = torch.tensor([1.0, -1.0, 2.0, 0.5, -3.0, 0.0, -2.0, -1.0], dtype=torch.float64)
R = torch.tensor([1.5, 0.9, 0.7, 1.1, 2.0, 1.0, 0.5, 1.25], dtype=torch.float64)
OLD, REF, ONES = LOGP - R.log(), LOGP.flip(0), torch.ones_like(LOGP)


def active(low, high, dual=math.inf):
    """Where the unclipped branch of the surrogate is the one that counts."""
    inside = torch.where(A > 0, R < 1 + high, R > 1 - low)
    return inside & ~((A < 0) & (R > dual))


CLOSED_FORMS = {
    "nll": (epilogues.nll, -ONES),
    "dft": (epilogues.dft, -LOGP.exp()),
    "unlikelihood": (epilogues.unlikelihood, LOGP.exp() / (1 - LOGP.exp()).clamp(min=1e-6)),
    "ppo_clip": (epilogues.ppo_clip(A, OLD), -A * R * active(0.2, 0.2)),
    "clip higher": (epilogues.ppo_clip(A, OLD, clip_low=0.15, clip_high=0.45), -A * R * active(0.15, 0.45)),
    "k2": (epilogues.k2_kl(0.3, REF), 0.3 * (LOGP - REF)),
    "dual clip": (epilogues.ppo_clip(A, OLD, dual_clip=1.5), -A * R * active(0.2, 0.2, 1.5)),
    "on policy": (epilogues.ppo_clip(A), -A),
    "cispo": (epilogues.cispo(A, OLD, clip_high=0.3), -A * R.clamp(max=1.3)),
    "cispo on policy": (epilogues.cispo(A), -A),
    "reinforce": (epilogues.reinforce(A, R), -A * R),
    "reinforce on policy": (epilogues.reinforce(A), -A),
    "k3_kl": (epilogues.k3_kl(0.3, REF), 0.3 * (1 - (REF - LOGP).exp())),
}


@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_derivative_is_the_closed_form(name):
    epilogue, want = CLOSED_FORMS[name]
    tokens = Tokens(LOGP, ONES, slice(0, 8))
    weight = torch.tensor([1.0, 2.0, -1.0, 0.5, 3.0, 1.0, 0.7, 0.0], dtype=torch.float64)
    by_logp, by_entropy = derivatives(epilogue, tokens, weight)
    torch.testing.assert_close(by_logp, weight * want, rtol=1e-9, atol=1e-9)
    assert by_entropy is None


def test_the_clip_table_has_every_branch():
    assert {bool(x) for x in active(0.2, 0.2)} == {True, False}
    assert ((A < 0) & (R > 1.5)).any() and (R.clamp(max=1.3) < R).any()


def test_entropy_bonus_is_a_derivative_by_entropy_alone():
    by_logp, by_entropy = derivatives(epilogues.entropy_bonus(0.4), Tokens(LOGP, ONES, slice(0, 8)), 2 * ONES)
    assert torch.equal(by_logp, 0 * LOGP) and torch.equal(by_entropy, -0.8 * ONES)


def test_metrics_of_each_token():
    tokens = Tokens(LOGP, ONES, slice(0, 8))
    loss, metrics = terms_of(epilogues.total(epilogues.ppo_clip(A, OLD), epilogues.k3_kl(0.3, REF)), tokens)
    torch.testing.assert_close(metrics["ratio"], R)
    assert torch.equal(metrics["clipped"], ((A > 0) & (R > 1.2) | (A < 0) & (R < 0.8)).double())
    torch.testing.assert_close(metrics["kl"], (REF - LOGP).exp() - (REF - LOGP) - 1)
    assert (metrics["kl"] >= 0).all()
    surrogate = -torch.minimum(R * A, R.clamp(0.8, 1.2) * A)
    torch.testing.assert_close(loss, surrogate + 0.3 * metrics["kl"])
    assert torch.equal(terms_of(epilogues.cispo(A, OLD, clip_high=0.3), tokens).metrics["clipped"], (R > 1.3).double())


def test_a_ratio_stays_finite():
    far = Tokens(torch.tensor([-1e4, -0.1]), torch.ones(2), slice(0, 2))
    epilogue = epilogues.ppo_clip(torch.ones(2), torch.tensor([-0.1, -1e4]))
    assert torch.isfinite(terms_of(epilogue, far).loss_r).all()
    assert all(torch.isfinite(g).all() for g in derivatives(epilogue, far, torch.ones(2)) if g is not None)


def head(S=12):
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(S, 4, generator=g).requires_grad_(), torch.randn(9, 4, generator=g)
    return hidden, weight, torch.randint(0, 9, (S,), generator=g)


def test_metrics_come_back_for_all_rows_without_gradient():
    hidden, weight, targets = head()
    out = linear_token_loss(
        hidden, weight, targets, torch.ones(12), loss=epilogues.ppo_clip(torch.ones(12), torch.zeros(12)), chunk_rows=5
    )
    torch.testing.assert_close(out.metrics["ratio"], out.logp_S.exp())
    assert not out.metrics["ratio"].requires_grad and out.metrics["clipped"].shape == (12,)


def test_gradients_reach_what_the_loss_was_made_from():
    """A learnt reward: the derivative of the loss by each advantage."""
    hidden, weight, targets = head()
    advantage = torch.randn(12, requires_grad=True)
    token_weight = torch.linspace(-1, 1, 12)
    out = linear_token_loss(hidden, weight, targets, token_weight, loss=epilogues.reinforce(advantage), chunk_rows=5)
    out.loss_sum.backward()
    torch.testing.assert_close(advantage.grad, -token_weight * out.logp_S)
    assert hidden.grad.abs().sum() > 0


def test_a_token_of_weight_zero_adds_nothing_even_if_its_loss_is_not_finite():
    hidden, weight, targets = head()
    advantage, old = torch.ones(12), torch.full((12,), -1.0)
    token_weight = torch.ones(12)
    token_weight[3], advantage[3], old[3] = 0.0, math.inf, math.nan
    for backend in ("torch", "reference"):
        hidden.grad = None
        loss = epilogues.ppo_clip(advantage, old)
        out = linear_token_loss(hidden, weight, targets, token_weight, loss=loss, chunk_rows=5, backend=backend)
        assert torch.isfinite(out.loss_sum)
        if backend == "torch":
            out.loss_sum.backward()
            assert torch.isfinite(hidden.grad).all() and not hidden.grad[3].any() and hidden.grad[4].any()


def test_the_reference_shares_the_head_and_gets_no_gradient():
    hidden, weight, targets = head()
    ref = torch.randn(12, 4, requires_grad=True)
    out = linear_token_loss(
        hidden, weight, targets, torch.ones(12), loss=epilogues.k3_kl(1.0), hidden_ref_SD=ref, chunk_rows=5
    )
    out.loss_sum.backward()
    ref_logp = torch.log_softmax(ref @ weight.T, -1)[torch.arange(12), targets].detach()
    torch.testing.assert_close(out.metrics["ref_logp"], ref_logp)
    torch.testing.assert_close(out.metrics["kl"], (ref_logp - out.logp_S).exp() - (ref_logp - out.logp_S) - 1)
    assert ref.grad is None and hidden.grad is not None


@pytest.mark.parametrize(
    "loss, message",
    [
        (lambda t: t.logp_r.mean(), r"its loss is of shape \(\); it must be one number for each of the 5 rows"),
        (lambda t: torch.ones(12) * 1.0, r"its loss is of shape \(12,\).*index data of the batch with tokens.rows"),
        (lambda t: Terms(t.logp_r, {"kl": torch.ones(1)}), r"kl is of shape \(1,\)"),
        (lambda t: 3.0, "its loss is float"),
        (epilogues.k3_kl(0.1), "k3_kl: ref_logp_S is None and linear_token_loss got no hidden_ref_SD"),
    ],
)
def test_a_loss_that_is_not_one_number_a_row_is_refused(loss, message):
    hidden, weight, targets = head(10)
    with pytest.raises(UserError, match=message):
        linear_token_loss(hidden, weight, targets, torch.ones(10), loss=loss, chunk_rows=5)
