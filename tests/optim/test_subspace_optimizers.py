"""GaLore, Fira and APOLLO against the published packages, closed forms and invariants."""

import json
from pathlib import Path

import pytest
import torch
from optim.golden import RANK, SCALE, SHAPES, gradients, start, trajectory

from lit_reason.errors import UserError
from lit_reason.optim.apollo import Apollo
from lit_reason.optim.fira import Fira
from lit_reason.optim.galore import GaLore
from lit_reason.optim.subspace import GROWTH, back, leading_basis, limit_growth, project

GOLDEN = json.loads(Path(__file__).with_name("golden.json").read_text())
KINDS = [GaLore, Fira, Apollo]


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def run(optimizer, weight, grads):
    for grad in grads:
        weight.grad = grad.clone()
        optimizer.step()
    return weight.detach().clone()


@pytest.mark.parametrize("name, kind", [("galore", GaLore), ("fira", Fira)])
@pytest.mark.parametrize("number", range(len(SHAPES)))
def test_the_steps_are_those_of_the_published_package(name, kind, number):
    ours = trajectory(lambda w: kind([w], lr=0.01, eps=1e-6, rank=RANK, scale=SCALE), SHAPES[number])
    moved = (torch.tensor(GOLDEN[name][number]) - start(SHAPES[number]).flatten()).abs().max()
    assert moved > 0.005
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(GOLDEN[name][number]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(7, 4), (4, 7), (5, 5)])
def test_a_basis_is_orthonormal_and_its_projection_the_best(shape):
    grad = noise(*shape)
    basis = leading_basis(grad, 2)
    torch.testing.assert_close(basis @ basis.mT, torch.eye(2), rtol=0, atol=1e-5)
    missed = (grad - back(project(grad, basis), basis)).norm()
    torch.testing.assert_close(missed, torch.linalg.svdvals(grad)[2:].norm())


@pytest.mark.parametrize("shape", [(6, 4), (4, 6)])
def test_galore_of_full_rank_turns_adam_into_the_gradients_basis(shape):
    """With every singular vector kept, the first update is a sign in a rotated frame."""
    grad, weight = noise(*shape), torch.nn.Parameter(torch.zeros(shape))
    after = run(GaLore([weight], lr=1.0, rank=4, eps=0.0), weight, [grad])
    basis = leading_basis(grad, 4)
    torch.testing.assert_close(after, -back(project(grad, basis).sign(), basis), rtol=1e-4, atol=1e-4)


def test_galore_moves_in_its_subspace_alone_and_fira_outside_too():
    grads = [noise(8, 5, seed=0)] * 3
    basis = leading_basis(grads[0], 2)
    moved = {}
    for kind in (GaLore, Fira):
        weight = torch.nn.Parameter(torch.zeros(8, 5))
        after = run(kind([weight], lr=0.1, rank=2, refresh_steps=9), weight, grads)
        moved[kind] = (after - back(project(after, basis), basis)).norm()
    assert moved[GaLore] < 1e-5 < 0.01 < moved[Fira]


def test_the_subspace_changes_every_refresh_and_the_moments_stay():
    weight = torch.nn.Parameter(torch.zeros(8, 5))
    optimizer = GaLore([weight], lr=0.1, rank=2, refresh_steps=2)
    bases = []
    for step in range(5):
        run(optimizer, weight, [noise(8, 5, seed=step)])
        bases.append(optimizer.state[weight]["basis"])
    same = [torch.equal(a, b) for a, b in zip(bases, bases[1:], strict=False)]
    assert same == [True, False, True, False]
    torch.testing.assert_close(bases[2], leading_basis(noise(8, 5, seed=2), 2))
    assert int(optimizer.state[weight]["step"]) == 5


def test_fira_as_in_the_paper_leaves_nothing_of_the_subspace_in_its_residual():
    grad = noise(8, 5)
    basis = leading_basis(grad, 2)
    inside = {}
    for paper_exact in (True, False):
        weight = torch.nn.Parameter(torch.zeros(8, 5))
        optimizer = Fira([weight], lr=1.0, rank=2, scale=0.25, paper_exact=paper_exact)
        residual = run(optimizer, weight, [grad]) + 0.25 * back(project(grad, basis).sign(), basis)
        inside[paper_exact] = project(residual, basis).norm() / residual.norm()
    assert inside[True] < 1e-3 < 0.1 < inside[False]


def test_growth_is_limited_to_one_percent_a_step():
    state = {}
    assert limit_growth(torch.ones(4), state).norm() == 2
    torch.testing.assert_close(limit_growth(10 * torch.ones(4), state).norm(), torch.tensor(2 * GROWTH))
    torch.testing.assert_close(limit_growth(10 * torch.ones(4), state).norm(), torch.tensor(2 * GROWTH**2))
    assert limit_growth(0.5 * torch.ones(4), state).norm() == 1, "it may shrink at once"


@pytest.mark.parametrize("shape", [(7, 4), (4, 7)])
def test_apollo_scales_channels_and_mini_the_whole_gradient(shape):
    grad = noise(*shape)
    for per_tensor, rank in ((False, 2), (True, 1)):
        weight = torch.nn.Parameter(torch.zeros(shape))
        optimizer = Apollo([weight], lr=1.0, rank=rank, eps=0.0, scale=4.0, per_tensor=per_tensor, seed=3)
        factor = -run(optimizer, weight, [grad]) / grad
        channels = factor if shape[0] > shape[1] else factor.mT
        torch.testing.assert_close(channels, channels[:, :1].expand_as(channels))
        spread = channels[:, 0].max() / channels[:, 0].min()
        assert (spread < 1.001) == per_tensor
        # At the first step Adam's direction is the sign, so a factor is sqrt(4 * entries) / |R|.
        basis = optimizer.basis(grad, 0, 0, {}, optimizer.param_groups[0])
        low = project(grad, basis)
        wanted = (
            2 * low.numel() ** 0.5 / low.norm()
            if per_tensor
            else 2 * rank**0.5 / low.norm(dim=int(shape[0] > shape[1]))
        )
        torch.testing.assert_close(channels[:, 0], wanted.expand(len(channels)), rtol=1e-4, atol=1e-5)


def test_apollos_subspace_is_random_by_matrix_and_period_and_repeats_by_seed():
    weights = [torch.nn.Parameter(torch.zeros(40, 30)) for _ in range(2)]
    optimizer = Apollo(weights, lr=1.0, rank=20, refresh_steps=3, seed=1)
    drawn = {
        (number, step): optimizer.basis(weights[0], step, number, {}, optimizer.param_groups[0])
        for number in (0, 1)
        for step in (0, 2, 3)
    }
    assert torch.equal(drawn[0, 0], drawn[0, 2])
    assert not torch.equal(drawn[0, 0], drawn[0, 3]) and not torch.equal(drawn[0, 0], drawn[1, 0])
    assert drawn[0, 0].std().item() == pytest.approx(20**-0.5, rel=0.1)
    again = Apollo(weights, lr=1.0, rank=20, refresh_steps=3, seed=1)
    assert torch.equal(again.basis(weights[0], 3, 0, {}, again.param_groups[0]), drawn[0, 3])


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_state_is_plain_tensors_and_goes_on_bit_for_bit(kind, tmp_path):
    grads = [noise(8, 5, seed=s) for s in range(7)]
    build = lambda w: kind([w], lr=0.1, rank=2, refresh_steps=3, weight_decay=0.1)  # noqa: E731
    whole = torch.nn.Parameter(torch.ones(8, 5))
    optimizer = build(whole)
    middle = run(optimizer, whole, grads[:4])
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    wanted = run(optimizer, whole, grads[4:])
    rest = torch.nn.Parameter(middle)
    resumed = build(rest)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(run(resumed, rest, grads[4:]), wanted)


@pytest.mark.parametrize(
    "kind, numbers", [(GaLore, 2 * 8 * 2 + 2 * 5), (Fira, 2 * 8 * 2 + 2 * 5 + 1), (Apollo, 2 * 8 * 2 + 1)]
)
def test_the_state_is_as_small_as_promised(kind, numbers):
    weight = torch.nn.Parameter(torch.zeros(8, 5))
    optimizer = kind([weight], lr=0.1, rank=2)
    run(optimizer, weight, [noise(8, 5)])
    assert sum(v.numel() for k, v in optimizer.state[weight].items() if k != "step") == numbers


@pytest.mark.parametrize("kind", KINDS)
def test_decay_is_decoupled_and_matrices_without_gradient_stay(kind):
    decayed, left = torch.nn.Parameter(torch.ones(4, 3)), torch.nn.Parameter(torch.ones(4, 3))
    decayed.grad = torch.zeros(4, 3)
    kind([decayed, left], lr=0.1, rank=2, weight_decay=0.5).step()
    torch.testing.assert_close(decayed.detach(), torch.full((4, 3), 0.95))
    assert torch.equal(left.detach(), torch.ones(4, 3))


def test_wrong_settings_are_refused():
    weight = torch.nn.Parameter(torch.zeros(8, 5))
    for rank in (0, 6):
        with pytest.raises(UserError, match=f"rank is {rank}, but a trained matrix is 8 x 5.*at most 5"):
            GaLore([weight], lr=0.1, rank=rank)
    with pytest.raises(UserError, match="refresh_steps is 0"):
        GaLore([weight], lr=0.1, rank=2, refresh_steps=0)


def test_the_gradients_of_the_golden_file_exercise_the_limiter():
    norms = [gradients((8, 5), step).norm() for step in range(3)]
    assert norms[1] > 1.01 * norms[0] and norms[2] > 1.01 * norms[1]
