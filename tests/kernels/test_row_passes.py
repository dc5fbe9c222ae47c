"""The row passes against autograd over float64 softmaxes."""

import math

import pytest
import torch

from lit_reason.kernels import row_passes
from lit_reason.kernels.row_passes import Transform, divergence_grad_, divergence_stats, row_grad_, row_stats

TRANSFORMS = [Transform(), Transform(None, 3.0, 0.5), Transform(torch.linspace(-1, 1, 129).double(), None, 2.0)]
KINDS = [("fkl", 0.5), ("rkl", 0.5), ("jsd", 0.1), ("jsd", 0.5), ("jsd", 0.9)]


def draw(*shape, seed=0, scale=3.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def z_of(logits, transform):
    z = logits if transform.bias_V is None else logits + transform.bias_V
    if transform.softcap is not None:
        z = torch.where(z == -math.inf, z, transform.softcap * torch.tanh(z / transform.softcap))
    return z * transform.inverse_temperature


def entropy_of(log_p):
    return -(log_p.exp() * log_p).nan_to_num(0.0).sum(-1)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_statistics_and_their_gradient(transform, monkeypatch):
    monkeypatch.setattr(row_passes, "SCRATCH_BYTES_ON_CPU", 3 * 8 * 129)  # blocks of three rows and one of one
    logits, targets = draw(10, 129).requires_grad_(), torch.arange(10) * 14
    log_p = torch.log_softmax(z_of(logits, transform), -1)
    logp, entropy = log_p[torch.arange(10), targets], entropy_of(log_p)
    before = logits.detach().clone()
    stats = row_stats(before, targets, transform)
    assert torch.equal(before, logits)
    torch.testing.assert_close(stats.logp_r, logp.detach())
    torch.testing.assert_close(stats.entropy_r, entropy.detach())
    torch.testing.assert_close(stats.largest_r + stats.log_sum_r, torch.logsumexp(z_of(logits, transform), -1).detach())
    best = z_of(logits, transform).argmax(-1)
    assert torch.equal(stats.hit_r, best == targets)
    assert row_stats(before, best, transform).hit_r.all()
    g_logp, g_entropy = draw(10, seed=1), draw(10, seed=2)
    (want,) = torch.autograd.grad(g_logp @ logp, logits, retain_graph=True)
    row_grad_(before, targets, stats, g_logp, None, transform)
    torch.testing.assert_close(before, want)
    before = logits.detach().clone()
    (want,) = torch.autograd.grad(g_logp @ logp + g_entropy @ entropy, logits)
    row_grad_(before, targets, stats, g_logp, g_entropy, transform)
    torch.testing.assert_close(before, want)


@pytest.mark.parametrize("kind, beta", KINDS)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_divergences_and_their_gradient(kind, beta, transform, monkeypatch):
    monkeypatch.setattr(row_passes, "SCRATCH_BYTES_ON_CPU", 3 * 8 * 129)
    student, teacher = draw(10, 129).requires_grad_(), draw(10, 129, seed=5)
    other = Transform(None, None, 0.7)
    log_p, log_q = (torch.log_softmax(z_of(a, t), -1) for a, t in ((student, transform), (teacher, other)))
    kl = lambda a, b: (a.exp() * (a - b)).sum(-1)  # noqa: E731
    mixture = (beta * log_q.exp() + (1 - beta) * log_p.exp()).log()
    value = {
        "fkl": kl(log_q, log_p),
        "rkl": kl(log_p, log_q),
        "jsd": beta * kl(log_q, mixture) + (1 - beta) * kl(log_p, mixture),
    }[kind]
    mine, theirs = student.detach().clone(), teacher.clone()
    stats = divergence_stats(mine, theirs, kind, beta, transform, other)
    torch.testing.assert_close(stats.value_r, value.detach())
    g = draw(10, seed=1)
    (want,) = torch.autograd.grad(g @ value, student)
    divergence_grad_(mine, theirs, stats, g, kind, beta, transform, other)
    torch.testing.assert_close(mine, want)
    assert torch.equal(theirs, teacher)


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_a_masked_column_is_as_if_it_were_not_there(softcap):
    logits, targets, transform = draw(4, 9), torch.tensor([0, 1, 5, 2]), Transform(None, softcap, 0.5)
    wide = torch.cat([logits, torch.full((4, 3), -math.inf, dtype=torch.float64)], 1)
    stats, narrow = row_stats(wide, targets, transform), row_stats(logits, targets, transform)
    for got, want in zip(stats, narrow, strict=True):
        torch.testing.assert_close(got, want)
    g = draw(4, seed=1)
    for kind, beta in KINDS:
        a, b = wide.clone(), wide.flip(0).contiguous()
        of_wide = divergence_stats(a, b, kind, beta, transform, transform)
        torch.testing.assert_close(of_wide, divergence_stats(logits, logits.flip(0), kind, beta, transform, transform))
        divergence_grad_(a, b, of_wide, g, kind, beta, transform, transform)
        assert torch.equal(a[:, 9:], torch.zeros_like(a[:, 9:])) and torch.isfinite(a).all()
    row_grad_(wide, targets, stats, g, g, transform)
    row_grad_(logits, targets, narrow, g, g, transform)
    torch.testing.assert_close(wide[:, :9], logits)
    assert torch.equal(wide[:, 9:], torch.zeros_like(wide[:, 9:]))


def test_a_divergence_is_infinite_where_the_other_has_no_chance():
    a, b = torch.zeros(1, 3), torch.tensor([[0.0, 0.0, -math.inf]])
    for kind, first, second in (("fkl", b, a), ("rkl", a, b)):
        assert divergence_stats(first, second, kind, 0.5, Transform(), Transform()).value_r.item() == math.inf


def test_a_target_elsewhere_has_no_column():
    logits = draw(2, 9)
    stats = row_stats(logits, torch.tensor([-1, 3]), Transform())
    torch.testing.assert_close(stats.logp_r[0], -torch.logsumexp(logits[0], -1))
    assert not stats.hit_r[0]
    p = logits.softmax(-1)
    row_grad_(logits, torch.tensor([-1, 3]), stats, torch.ones(2).double(), None, Transform())
    torch.testing.assert_close(logits[0], -p[0])


def test_far_away_logits_lose_no_digits():
    """float32 at -1e6 has steps of 1/16: a partition sum in one number would miss its logarithm."""
    logits = torch.tensor([[-1e6, -1e6, -1e6 - 1]])
    stats = row_stats(logits, torch.tensor([0]), Transform())
    near = row_stats(logits + 1e6, torch.tensor([0]), Transform())
    assert torch.equal(stats.logp_r, near.logp_r) and torch.equal(stats.entropy_r, near.entropy_r)
    row_grad_(logits, torch.tensor([0]), stats, torch.ones(1), None, Transform())
    assert abs(float(logits.sum())) < 1e-6
