"""What inverse RL does where everything can be counted: gradients in closed form, fixed points, planted rewards.

The losses are those that the regime trains with. Tabular policies: a softmax over a table of scores.
Shape letters: A arms, Y sequences of an enumerable language.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from lit_reason.losses.preference import chi2_penalty, margin_loss, pair_loss
from lit_reason.regimes.irl.watch import accuracy, contraction, correlation

F64 = torch.float64


def draw(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def divergence(p: torch.Tensor, q: torch.Tensor) -> float:
    return float((p * (p.log() - q.log())).sum())


def inner(reward_A: torch.Tensor, log_ref_A: torch.Tensor, beta: float) -> torch.Tensor:
    """Log of the policy that solves the lower level."""
    return (log_ref_A + reward_A / beta).log_softmax(-1)


def expected_loss(reward: torch.Tensor, expert: torch.Tensor, policy: torch.Tensor, shape: str) -> torch.Tensor:
    """The pair loss over all pairs of a demonstration and an answer."""
    margins = reward[:, None] - reward[None, :]
    return (expert[:, None] * policy[None, :] * margin_loss(margins, shape)).sum()


# ---- the gradient of the outer level -----------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.3, 1.0, 2.5])
def test_the_linear_loss_has_the_gradient_of_the_likelihood(beta):
    expert, log_ref = draw(6, seed=1).softmax(-1), draw(6, seed=2).log_softmax(-1)
    reward = draw(6, seed=3).requires_grad_()
    likelihood = (expert * inner(reward, log_ref, beta)).sum()
    (through_both_levels,) = torch.autograd.grad(likelihood, reward)
    policy = inner(reward, log_ref, beta).exp().detach()
    (of_loss,) = torch.autograd.grad(expected_loss(reward, expert, policy, "linear"), reward)
    torch.testing.assert_close(through_both_levels, (expert - policy) / beta, rtol=0, atol=1e-8)
    torch.testing.assert_close(-of_loss / beta, through_both_levels, rtol=0, atol=1e-8)


def test_climbing_the_likelihood_ends_at_the_expert_with_the_reward_that_explains_it():
    beta, expert, log_ref = 0.7, draw(6, seed=1).softmax(-1), draw(6, seed=2).log_softmax(-1)
    reward = torch.zeros(6, dtype=F64)
    for _ in range(2000):
        reward += 2.0 * beta * (expert - inner(reward, log_ref, beta).exp())
    assert divergence(expert, inner(reward, log_ref, beta).exp()) < 1e-10
    gap = reward - beta * (expert.log() - log_ref)
    assert float(gap.max() - gap.min()) < 1e-4  # known up to a constant


def test_a_sampled_gradient_is_the_exact_one_in_a_language_that_can_be_counted():
    """Vocabulary 5, length 4: 625 sequences. The reward is linear in bigram counts."""
    words = torch.tensor(list(itertools.product(range(5), repeat=4)))
    features = torch.zeros(len(words), 25, dtype=F64)
    for k in range(3):
        features.scatter_add_(1, (5 * words[:, k] + words[:, k + 1])[:, None], torch.ones(len(words), 1, dtype=F64))
    first, then = draw(5, seed=4).log_softmax(-1), draw(5, 5, seed=5).log_softmax(-1)
    log_ref = first[words[:, 0]] + sum(then[words[:, k], words[:, k + 1]] for k in range(3))
    assert float(log_ref.logsumexp(0)) == pytest.approx(0, abs=1e-12)  # the autoregressive model is normalised
    beta, theta = 0.8, draw(25, seed=6).requires_grad_()
    expert = inner(features @ draw(25, seed=7), log_ref, beta).exp()
    likelihood = (expert * inner(features @ theta, log_ref, beta)).sum()
    exact = torch.autograd.grad(likelihood, theta)[0]
    policy = inner(features @ theta, log_ref, beta).exp().detach()
    generator, n = torch.Generator().manual_seed(8), 40_000
    shown, sampled = (
        features[torch.multinomial(p, n, replacement=True, generator=generator)] for p in (expert, policy)
    )
    each = (shown - sampled) / beta
    errors = (each.mean(0) - exact).abs() / (each.std(0) / n**0.5)
    assert float(errors.max()) < 3.0
    assert float(exact.abs().max()) > 20 * float(each.std(0).max() / n**0.5)  # it is no noise that agrees


# ---- the penalty that bounds the linear loss ----------------------------------------------------------------------


def penalised(reward: torch.Tensor, expert: torch.Tensor, policy: torch.Tensor, weight: float) -> torch.Tensor:
    both = expert[:, None] * policy[None, :]
    penalty = chi2_penalty(*torch.broadcast_tensors(reward[:, None], reward[None, :]))
    return expected_loss(reward, expert, policy, "linear") + weight * (both * penalty).sum()


@pytest.mark.parametrize("weight", [0.1, 2.0])
def test_the_penalised_linear_loss_has_the_gradient_and_the_optimum_of_its_closed_form(weight):
    expert, policy = draw(6, seed=1).softmax(-1), draw(6, seed=2).softmax(-1)
    reward = draw(6, seed=3).requires_grad_()
    (gradient,) = torch.autograd.grad(penalised(reward, expert, policy, weight), reward)
    by_hand = policy - expert + weight / 2 * (expert + policy) * reward.detach()
    torch.testing.assert_close(gradient, by_hand, rtol=0, atol=1e-12)
    best, even = 2 / weight * (expert - policy) / (expert + policy), (expert + policy) / 2
    lowest = float(penalised(best, expert, policy, weight))
    assert lowest == pytest.approx(-2 / weight * float(((expert - even) ** 2 / even).sum()), rel=1e-12)
    for seed in range(5):
        assert float(penalised(best + draw(6, seed=seed, scale=1e-2), expert, policy, weight)) > lowest


def test_the_penalised_optimum_is_bounded_where_the_two_share_nothing():
    expert = torch.tensor([0.5, 0.5, 0.0], dtype=F64)
    policy = torch.tensor([0.0, 0.5, 0.5], dtype=F64)
    reward = torch.zeros(3, dtype=F64, requires_grad=True)
    for _ in range(200):
        (gradient,) = torch.autograd.grad(penalised(reward, expert, policy, 0.5), reward)
        reward = (reward - gradient).detach().requires_grad_()
    torch.testing.assert_close(reward.detach(), torch.tensor([4.0, 0.0, -4.0], dtype=F64), rtol=0, atol=1e-8)


def test_the_penalty_is_half_the_mean_square_with_its_gradient_by_differences():
    chosen, rejected = draw(4, seed=1).requires_grad_(), draw(4, seed=2).requires_grad_()
    assert torch.autograd.gradcheck(chi2_penalty, (chosen, rejected))
    mean_square = torch.stack([chosen, rejected]).pow(2).mean(0)
    torch.testing.assert_close(chi2_penalty(chosen, rejected), mean_square / 2, rtol=0, atol=1e-15)


# ---- the Bradley-Terry surrogate ---------------------------------------------------------------------------------


def bradley_terry_reward(expert: torch.Tensor, policy: torch.Tensor) -> torch.Tensor:
    reward = torch.zeros_like(expert, requires_grad=True)
    solver = torch.optim.LBFGS([reward], max_iter=500, tolerance_grad=1e-14, tolerance_change=1e-16, history_size=20)

    def closure() -> torch.Tensor:
        solver.zero_grad()
        loss = expected_loss(reward, expert, policy, "sigmoid")
        loss.backward()
        return loss

    for _ in range(5):
        solver.step(closure)
    return (reward - reward.mean()).detach()


def test_bradley_terry_finds_the_log_ratio_of_expert_and_policy():
    expert, policy = draw(6, seed=1).softmax(-1), draw(6, seed=2).softmax(-1)
    ratio = expert.log() - policy.log()
    torch.testing.assert_close(bradley_terry_reward(expert, policy), ratio - ratio.mean(), rtol=0, atol=1e-5)


def test_at_the_expert_the_linear_gradient_vanishes_and_the_bradley_terry_one_does_not():
    expert, reward = draw(6, seed=1).softmax(-1), draw(6, seed=3).requires_grad_()
    norms = {}
    for shape in ("linear", "sigmoid"):
        (gradient,) = torch.autograd.grad(expected_loss(reward, expert, expert, shape), reward)
        norms[shape] = float(gradient.norm())
    assert norms["linear"] < 1e-12 and norms["sigmoid"] > 0.01
    flat = torch.zeros(6, dtype=F64, requires_grad=True)
    (gradient,) = torch.autograd.grad(expected_loss(flat, expert, expert, "sigmoid"), flat)
    assert float(gradient.norm()) < 1e-12


def rounds(beta: float, count: int, *, reference: str) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Rounds in which both levels are solved: expert, first policy, and the policy after each round (logs)."""
    expert, first = draw(6, seed=1).log_softmax(-1), draw(6, seed=2).log_softmax(-1)
    policies = [first]
    for _ in range(count):
        reward = expert - policies[-1]  # the Bradley-Terry optimum
        policies.append(inner(reward, policies[-1] if reference == "previous" else first, beta))
    return expert, first, policies


@pytest.mark.parametrize(("beta", "regime"), [(0.4, "diverges"), (0.5, "cycles"), (0.6, "contracts"), (1.0, "at once")])
def test_the_stability_of_rounds_is_as_predicted(beta, regime):
    expert, _, policies = rounds(beta, 12, reference="previous")
    gaps = [divergence(expert.exp(), policy.exp()) for policy in policies]
    factor = contraction(beta)
    shifts = [float((p - expert - (p - expert).mean()).norm()) for p in policies]
    assert all(b == pytest.approx(factor * a, rel=1e-6, abs=1e-9) for a, b in zip(shifts, shifts[1:], strict=False))
    if regime == "diverges":
        assert gaps[-1] > 10 * gaps[0] and factor > 1
    elif regime == "cycles":
        assert gaps[-1] == pytest.approx(gaps[0], rel=1e-6) and gaps[1] != pytest.approx(gaps[0], rel=0.01)
    elif regime == "contracts":
        assert gaps[-1] < 1e-3 * gaps[0] and factor < 1
    else:
        assert gaps[1] < 1e-12


def test_a_fixed_reference_ends_at_a_mix_and_never_at_the_expert():
    beta = 2.0
    expert, first, policies = rounds(beta, 80, reference="initial")
    mix = (beta / (1 + beta) * first + expert / (1 + beta)).log_softmax(-1)
    assert divergence(mix.exp(), policies[-1].exp()) < 1e-12
    assert divergence(expert.exp(), policies[-1].exp()) > 0.1
    _, _, wild = rounds(0.5, 12, reference="initial")
    assert divergence(expert.exp(), wild[-1].exp()) > divergence(expert.exp(), wild[0].exp())


# ---- planted rewards ---------------------------------------------------------------------------------------------


def planted() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rewards of 625 sequences by two planted bigrams, uniform reference, and the share of each demonstrated."""
    words = torch.tensor(list(itertools.product(range(5), repeat=4)))
    pairs = [(0, 1), (3, 2)]
    reward = 2 * sum(((words[:, k] == a) & (words[:, k + 1] == b)).to(F64) for a, b in pairs for k in range(3))
    expert = reward.softmax(0)
    return words, reward, expert


def test_a_planted_reward_is_recovered_by_a_table():
    words, reward, expert = planted()
    shown = torch.multinomial(expert, 200_000, replacement=True, generator=torch.Generator().manual_seed(1))
    seen = torch.bincount(shown, minlength=len(words)).to(F64) / len(shown)
    log_ref = torch.full((625,), -(torch.tensor(625.0, dtype=F64)).log().item(), dtype=F64)
    table = torch.zeros(625, dtype=F64)
    for _ in range(300):
        table += 100.0 * (seen - inner(table, log_ref, 1.0).exp())  # the linear loss's gradient, beta 1
    assert correlation(table, reward) > 0.99


def neural_reward(words: torch.Tensor, shown: torch.Tensor, answered: torch.Tensor, steps: int = 150):
    """A small network on one-hot words, trained by Bradley-Terry on pairs drawn anew each step."""
    torch.manual_seed(0)
    hot = torch.nn.functional.one_hot(words, 5).flatten(1).float()
    network = torch.nn.Sequential(torch.nn.Linear(20, 64), torch.nn.Tanh(), torch.nn.Linear(64, 1))
    solver = torch.optim.AdamW(network.parameters(), lr=1e-2, weight_decay=1e-2)
    generator = torch.Generator().manual_seed(2)
    for _ in range(steps):
        pick = [t[torch.randint(len(t), (256,), generator=generator)] for t in (shown, answered)]
        chosen, rejected = (network(hot[i])[:, 0] for i in pick)
        loss = margin_loss(chosen - rejected, "sigmoid").mean()
        solver.zero_grad()
        loss.backward()
        solver.step()
    return network(hot)[:, 0].detach().double()


def test_a_planted_reward_is_recovered_by_a_network():
    words, reward, expert = planted()
    generator = torch.Generator().manual_seed(1)
    shown = torch.multinomial(expert, 20_000, replacement=True, generator=generator)
    answered = torch.randint(625, (20_000,), generator=generator)
    assert correlation(neural_reward(words, shown, answered, steps=400), reward) > 0.9


def test_controls_swapped_labels_turn_the_reward_over_and_own_samples_teach_nothing():
    words, reward, expert = planted()
    generator = torch.Generator().manual_seed(1)
    shown, held = (torch.multinomial(expert, 20_000, replacement=True, generator=generator) for _ in range(2))
    answered, other = (torch.randint(625, (20_000,), generator=generator) for _ in range(2))

    def held_out(score: torch.Tensor) -> float:
        return float(accuracy(score[held] - score[other]).mean())

    right, swapped = neural_reward(words, shown, answered), neural_reward(words, answered, shown)
    nothing = neural_reward(words, other, answered)  # both sides from the policy
    assert held_out(right) > 0.65 and held_out(swapped) < 0.35
    fresh = torch.randint(625, (2, 20_000), generator=generator)
    assert float(accuracy(nothing[fresh[0]] - nothing[fresh[1]]).mean()) == pytest.approx(0.5, abs=0.02)
    assert nothing.std() < 0.5 * right.std()


# ---- the implicit variant ----------------------------------------------------------------------------------------


def test_irft_with_a_linear_loss_is_the_explicit_gradient():
    """At the start of a round, where the policy is its own reference, for a one-step softmax policy."""
    expert, theta = draw(6, seed=1).softmax(-1), draw(6, seed=2).requires_grad_()
    log_policy = theta.log_softmax(-1)
    ratio = log_policy - log_policy.detach()
    policy = log_policy.exp().detach()
    weight = expert[:, None] * policy[None, :]
    each = pair_loss(
        ratio[:, None].expand(6, 6).flatten(), ratio[None, :].expand(6, 6).flatten(), beta=0.3, shape="linear"
    )
    (gradient,) = torch.autograd.grad((weight.flatten() * each).sum(), theta)
    torch.testing.assert_close(-gradient, 0.3 * (expert - policy), rtol=0, atol=1e-8)


def test_irft_spin_and_dpo_are_one_loss_where_they_must_be():
    """SPIN (arXiv 2401.01335, eq. 4.7) and DPO (arXiv 2305.18290, eq. 7), written out, with pi_k as reference."""
    now, before = draw(50, 2, seed=3, scale=5.0), draw(50, 2, seed=4, scale=5.0)
    beta = 0.1
    ratio = now - before
    ours = pair_loss(ratio[:, 0], ratio[:, 1], beta=beta, shape="sigmoid")
    spin = torch.log(1 + torch.exp(-(beta * ratio[:, 0] - beta * ratio[:, 1])))
    dpo = -torch.log(torch.sigmoid(beta * ((now[:, 0] - now[:, 1]) - (before[:, 0] - before[:, 1]))))
    torch.testing.assert_close(ours, spin, rtol=0, atol=1e-6)
    torch.testing.assert_close(ours, dpo, rtol=0, atol=1e-6)
    same = margin_loss(beta * (ratio[:, 0] - ratio[:, 1]), "sigmoid")  # as the regime forms it
    torch.testing.assert_close(ours, same, rtol=0, atol=1e-12)
