"""LORO against the refactorization it shares, first-order theory, and plain AdamW."""

import pytest
import torch

from lit_reason.errors import UserError
from lit_reason.kernels.refactorization import refactorize
from lit_reason.optim.loro import Loro, exact_step


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def up_to_signs(factor):
    """Columns with their largest entry positive."""
    return factor * factor.gather(0, factor.abs().argmax(0, keepdim=True)).sign()


@pytest.mark.parametrize("shape", [(12, 7), (7, 12), (5, 4)])  # the last has less than 2 R rows
def test_with_rate_zero_an_exact_step_is_the_refactorization(shape):
    m, n = noise(shape[0], 3), 10 * noise(shape[1], 3, seed=1)
    new_m, new_n = exact_step(m, n, noise(shape[0], 3, seed=2), noise(shape[1], 3, seed=3), 0.0)
    want_m, want_n = refactorize(m, n)
    torch.testing.assert_close(up_to_signs(new_m), want_m)
    torch.testing.assert_close(new_m @ new_n.mT, want_m @ want_n.mT)
    torch.testing.assert_close(new_m.mT @ new_m, new_n.mT @ new_n)


def test_an_exact_step_is_the_projected_gradient_step_to_first_order():
    """W moves by -lr (U U^T G + G V V^T - U U^T G V V^T), with an error of order lr^2."""
    m, n, grad = noise(9, 3), noise(8, 3, seed=1), noise(9, 8, seed=2)
    u, v = torch.linalg.qr(m)[0], torch.linalg.qr(n)[0]
    left, right = u @ u.mT, v @ v.mT
    tangent = left @ grad + grad @ right - left @ grad @ right
    errors = []
    for lr in (1e-3, 1e-4):
        new_m, new_n = exact_step(m, n, grad @ n, grad.mT @ m, lr)
        errors.append(((new_m @ new_n.mT - m @ n.mT) / lr + tangent).norm() / tangent.norm())
    assert errors[0] < 0.01 and errors[1] == pytest.approx(errors[0].item() / 10, rel=0.1)


def pair(scale, **settings):
    b, a = torch.nn.Parameter(noise(8, 2)), torch.nn.Parameter(noise(6, 2, seed=1))
    return b, a, Loro([{"params": [b, a], "scales": [scale]}], lr=0.1, **settings)


def step(optimizer, seed):
    for group in optimizer.param_groups:
        for number, p in enumerate(group["params"]):
            p.grad = noise(*p.shape, seed=100 * seed + number).to(p.dtype)
    optimizer.step()


def test_a_lazy_step_is_adam_with_the_rate_times_rank_over_the_shorter_side():
    b, a, optimizer = pair(4.0, exact_steps=50)
    before = b.detach().clone(), a.detach().clone()
    step(optimizer, 1)
    for p, old in zip((b, a), before, strict=True):  # Adam's first update is the sign
        torch.testing.assert_close(p.detach(), old - 0.1 * (2 / 6) / 2 * p.grad.sign(), rtol=1e-5, atol=1e-6)


def test_every_period_a_step_is_exact_and_all_moments_begin_anew():
    b, a, optimizer = pair(1.0, exact_steps=3)
    norm = torch.nn.Parameter(torch.ones(4))
    optimizer.add_param_group({"params": [norm]})
    for number in range(1, 7):
        step(optimizer, number)
        balance = (b.mT @ b - a.mT @ a).norm() / (b.mT @ b).norm()
        assert (balance < 1e-6) == (number % 3 == 0)
        assert {int(optimizer.state[p]["step"]) for p in (b, a, norm)} == {number % 3}
        assert all(bool(optimizer.state[p]["exp_avg"].any()) == (number % 3 != 0) for p in (b, a, norm))


def test_the_scale_of_a_layer_stays_outside_the_factors():
    moved = []
    for scale in (1.0, 4.0):
        b, a, optimizer = pair(scale, exact_steps=1)
        with torch.no_grad():
            b /= scale**0.5
            a /= scale**0.5
        step(optimizer, 1)
        moved.append(scale * b.detach() @ a.detach().mT)
    torch.testing.assert_close(moved[0], moved[1])


def test_other_parameters_get_plain_adamw():
    ours, theirs = (torch.nn.Parameter(torch.linspace(-1, 1, 5)) for _ in range(2))
    loro = Loro([{"params": [ours], "weight_decay": 0.1}], lr=0.1, eps=0.0, exact_steps=50)
    adamw = torch.optim.AdamW([theirs], lr=0.1, eps=0.0, weight_decay=0.1)
    for number in range(4):
        ours.grad = theirs.grad = noise(5, seed=number).float()
        loro.step()
        adamw.step()
    torch.testing.assert_close(ours.detach(), theirs.detach())


def test_a_factor_without_full_rank_is_refused():
    with pytest.raises(UserError, match="lowrank.init to kaiming"):
        exact_step(torch.zeros(5, 2), torch.ones(4, 2), torch.ones(5, 2), torch.ones(4, 2), 0.1)


def test_a_saved_state_goes_on(tmp_path):
    b, a, optimizer = pair(2.0, exact_steps=4)
    for number in range(3):
        step(optimizer, number)
    torch.save((b.detach(), a.detach(), optimizer.state_dict()), tmp_path / "state.pt")
    old_b, old_a, state = torch.load(tmp_path / "state.pt", weights_only=True)
    other_b, other_a, resumed = pair(2.0, exact_steps=4)
    other_b.data, other_a.data = old_b.clone(), old_a.clone()
    resumed.load_state_dict(state)
    for number in range(3, 6):
        step(optimizer, number)
        step(resumed, number)
    assert torch.equal(b, other_b) and torch.equal(a, other_a)


def test_factors_are_not_decayed():
    moved = []
    for decay in (0.0, 0.5):
        b, a, optimizer = pair(1.0, exact_steps=9, weight_decay=decay)
        step(optimizer, 1)
        moved.append(b.detach())
    assert torch.equal(*moved)
