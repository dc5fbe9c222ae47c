"""Directions have the closed forms that theory gives them, and bad input is refused by name."""

from __future__ import annotations

import math
from dataclasses import replace
from statistics import NormalDist

import numpy as np
import pytest
import torch
from tiny_steering import evidence, exact_probe, unit

from lit_reason.errors import UserError
from lit_reason.steering.config import DirectionConfig
from lit_reason.steering.direction import confident, find_direction, same_count
from lit_reason.steering.probe import fit_probe

RAW = DirectionConfig(center=False, min_selected=1)


def two_gaussians(mu_F: torch.Tensor, n: int = 4000, seed: int = 0, scale: torch.Tensor | None = None):
    """Features of classes 0 at -mu and 1 at mu."""
    labels = np.repeat([0, 1], n)
    noise = torch.randn(2 * n, len(mu_F), generator=torch.Generator().manual_seed(seed))
    noise = noise if scale is None else noise @ scale.T
    return noise + torch.from_numpy(2 * labels - 1)[:, None] * mu_F, labels


def test_with_beta_zero_the_direction_is_the_class_mean():
    x, y = two_gaussians(torch.tensor([1.0, 0.5, 0.0]), 300)
    vector, counts = find_direction(evidence(x, y), 1, replace(RAW, beta=0.0))
    assert torch.equal(vector, x[300:].mean(0)) and counts == {"selected": 300, "selected_by": "beta", "total": 300}
    centred, _ = find_direction(evidence(x, y), 1, replace(RAW, beta=0.0, center=True))
    torch.testing.assert_close(centred, (x[300:].mean(0) - x[:300].mean(0)) / 2)


def test_a_higher_beta_goes_further_along_the_discriminant():
    mu, scale = torch.tensor([0.6, -0.2, 0.1]), torch.tensor([[1.0, 0, 0], [0.8, 0.5, 0], [0, 0.3, 1.5]])
    x, y = two_gaussians(mu, scale=scale)
    discriminant = unit(torch.linalg.solve(scale @ scale.T, mu))
    found = evidence(x, y)
    along = [float(find_direction(found, 1, replace(RAW, beta=b))[0] @ discriminant) for b in (0, 0.3, 0.5, 0.7, 0.9)]
    assert all(low + 0.01 < high for low, high in zip(along, along[1:], strict=False)), along


@pytest.mark.parametrize("beta", [0.3, 0.5, 0.8, 0.95])
def test_in_one_dimension_it_is_the_mean_of_a_truncated_normal(beta):
    m, n = 0.7, 200_000
    x, y = two_gaussians(torch.tensor([m]), n)
    vector, counts = find_direction(evidence(x, y, probe=exact_probe(torch.tensor([m]))), 1, replace(RAW, beta=beta))
    normal, c = NormalDist(), math.log(beta / (1 - beta)) / (2 * m)
    kept = 1 - normal.cdf(c - m)
    error = 4 / math.sqrt(n * kept)
    assert counts["selected"] / n == pytest.approx(kept, abs=error)
    assert float(vector) == pytest.approx(m + normal.pdf(c - m) / kept, abs=error)


def test_confidence_sees_through_wrong_labels():
    mu = torch.zeros(8).index_fill_(0, torch.tensor([0]), 1.5)
    x, y = two_gaussians(mu, 1000)
    rng = np.random.default_rng(0)
    wrong = rng.random(len(y)) < 0.2
    found = evidence(x, np.where(wrong, 1 - y, y))
    filtered, _ = find_direction(found, 1, replace(RAW, beta=0.5))
    plain, _ = find_direction(found, 1, replace(RAW, method="mean"))
    truth = unit(mu)
    assert unit(filtered) @ truth > unit(plain) @ truth
    assert float((filtered - mu).norm()) < 0.5 * float((plain - mu).norm())


def test_each_of_three_directions_is_largest_at_its_own_class():
    labels = np.repeat([0, 1, 2], 200)
    x = 2 * torch.eye(3)[torch.from_numpy(labels)] + torch.randn(600, 3, generator=torch.Generator().manual_seed(0))
    found = evidence(x, labels)
    for method in ("confident", "mean_difference", "mean", "probe_weight", "same_count"):
        config = DirectionConfig(method=method)
        assert [int(find_direction(found, k, config)[0].argmax()) for k in range(3)] == [0, 1, 2], method


def test_a_feature_of_another_class_is_never_kept():
    x, y = two_gaussians(torch.tensor([1.0]), 500)
    kept, how = confident(evidence(x, y), 1, replace(RAW, beta=0.5))
    assert how == "beta" and set(y[kept]) == {1} and (x[kept] > 0).float().mean() > 0.95


def test_the_control_draws_as_many_without_looking():
    x, y = two_gaussians(torch.tensor([1.0, 0.0]), 500)
    found, config = evidence(x, y), replace(RAW, beta=0.8)
    kept, (drawn, how) = confident(found, 1, config)[0], same_count(found, 1, config)
    assert len(drawn) == len(kept) == len(set(drawn)) and how == "beta" and set(y[drawn]) == {1}
    assert not np.array_equal(kept, drawn) and np.array_equal(drawn, same_count(found, 1, config)[0])
    assert float(x[drawn, 0].mean()) < float(x[kept, 0].mean()) - 0.1
    assert not np.array_equal(drawn, same_count(replace(found, seed=1), 1, config)[0])


def test_the_mean_difference_leaves_out_what_all_share():
    labels = np.repeat([0, 1, 2], [50, 100, 150])
    x = torch.randn(300, 4, generator=torch.Generator().manual_seed(0)) + 100
    vector, _ = find_direction(evidence(x, labels), 0, DirectionConfig(method="mean_difference"))
    torch.testing.assert_close(vector, x[:50].mean(0) - (x[50:150].mean(0) + x[150:].mean(0)) / 2)
    centred, _ = find_direction(evidence(x, labels), 0, DirectionConfig(beta=0.0))
    assert float(unit(centred) @ unit(vector)) == pytest.approx(1, abs=1e-4)  # the same but for length


def test_caa_takes_the_last_token_of_each_paired_text():
    # texts 0..5 of two tokens each; pairs (0, 1) and (2, 3); 4 and 5 are without a pair
    x = torch.arange(12.0)[:, None] ** 2
    found = evidence(
        x, np.repeat([0, 1, 0, 1, 0, 1], 2), rows_N=np.repeat(np.arange(6), 2), places_N=np.tile([1, 2], 6),
        pair_of={0: "p", 1: "p", 2: "q", 3: "q", 4: "r"},
    )  # fmt: skip
    vector, counts = find_direction(found, 1, DirectionConfig(method="caa"))
    assert float(vector) == ((9 - 1) + (49 - 25)) / 2 and counts["pairs"] == 2
    with pytest.raises(UserError, match="data.pair_field"):
        find_direction(replace(found, pair_of={}), 1, DirectionConfig(method="caa"))


def test_act_add_needs_its_two_prompts():
    x, y = two_gaussians(torch.tensor([1.0]), 20)
    difference = torch.ones(3, 1)
    vector, _ = find_direction(evidence(x, y, contrasts={"c1": difference}), 1, DirectionConfig(method="act_add"))
    assert torch.equal(vector, difference)
    with pytest.raises(UserError, match=r"direction.contrast has no pair of prompts for 'c0'"):
        find_direction(evidence(x, y, contrasts={"c1": difference}), 0, DirectionConfig(method="act_add"))


def test_a_random_direction_looks_at_nothing_but_the_seed():
    x, y = two_gaussians(torch.zeros(6), 20)
    config = DirectionConfig(method="random")
    (a, _), (b, _) = (find_direction(evidence(f, y), 1, config) for f in (x, 3 * x))
    other, _ = find_direction(evidence(x, y, seed=1), 1, config)
    assert (
        torch.equal(a, b)
        and not torch.equal(a, other)
        and not torch.equal(a, find_direction(evidence(x, y), 0, config)[0])
    )


@pytest.mark.parametrize("method", ["confident", "same_count"])
def test_a_beta_that_nothing_reaches_does_what_the_settings_say(method):
    x, y = two_gaussians(torch.tensor([0.1, 0.0]), 50)
    config = DirectionConfig(method=method, beta=0.999, min_selected=7, center=False)
    found = evidence(x, y)
    with pytest.raises(UserError, match=r"class 'c1': 0 of 50 .* direction.beta 0.999, min_selected is 7.*on_empty"):
        find_direction(found, 1, config)
    likeliest = found.log_probs_NK[50:, 1].argsort(descending=True)[:7] + 50
    vector, counts = find_direction(found, 1, replace(config, on_empty="topk"))
    assert counts["selected"] == 7 and counts["selected_by"] == "topk"
    if method == "confident":
        torch.testing.assert_close(vector, x[likeliest].mean(0))
    vector, counts = find_direction(found, 1, replace(config, on_empty="mean"))
    assert counts["selected"] == 50 and torch.allclose(vector, x[50:].mean(0))


def test_a_direction_that_is_nothing_is_refused():
    x, y = torch.ones(20, 2), np.repeat([0, 1], 10)
    with pytest.raises(UserError, match="'c1': the direction by mean_difference is zero or not finite"):
        find_direction(evidence(x, y), 1, DirectionConfig(method="mean_difference"))


def test_the_probe_is_at_its_optimum():
    """Independent of the solver: the gradient of the stated loss vanishes in the standardised space."""
    rng = torch.Generator().manual_seed(0)
    y = torch.tensor([0] * 30 + [1] * 50 + [2] * 20)
    x = torch.randn(100, 5, generator=rng) * torch.tensor([1, 10, 0.1, 3, 1]) + y[:, None]
    probe = fit_probe(x, y, 3, penalty=0.05)
    mean, scale = x.double().mean(0), x.double().std(0, correction=0)
    w = (probe.weight_KF.double() * scale).requires_grad_()
    b = (probe.bias_K.double() + probe.weight_KF.double() @ mean).requires_grad_()
    weight = (100 / (3 * torch.bincount(y).double()))[y]
    nll = torch.nn.functional.cross_entropy(((x - mean) / scale) @ w.T + b, y, reduction="none")
    ((weight * nll).mean() + 0.025 * w.square().sum()).backward()
    assert w.grad.abs().max() < 1e-5 and b.grad.abs().max() < 1e-5
    assert weight.mean() == pytest.approx(1)
