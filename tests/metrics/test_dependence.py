"""HSIC against the sums it is defined by, and the properties that make it useful."""

from __future__ import annotations

import math
from itertools import permutations
from statistics import median

import pytest
import torch

from lit_reason.metrics.dependence import dependence, gaussian_kernel


def draw(n: int, *widths: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, width, generator=generator, dtype=torch.float64) for width in widths]


def plain_kernel(x: torch.Tensor) -> list[list[float]]:
    """The Gaussian kernel by the book, in Python."""
    rows = x.tolist()
    distances = [[math.dist(a, b) for b in rows] for a in rows]
    n = len(rows)
    width = median(distances[i][j] for i in range(n) for j in range(i))
    return [[math.exp(-(d**2) / (2 * width**2)) for d in row] for row in distances]


def plain_hsic(k: list[list[float]], el: list[list[float]]) -> float:
    """Means over ordered pairs, triples and quadruples of different samples: E[k l] - 2 E[k l'] + E[k] E[l]."""
    n = len(k)
    pairs = [k[i][j] * el[i][j] for i, j in permutations(range(n), 2)]
    triples = [k[i][j] * el[i][q] for i, j, q in permutations(range(n), 3)]
    fours = [k[i][j] * el[q][r] for i, j, q, r in permutations(range(n), 4)]
    return sum(pairs) / len(pairs) - 2 * sum(triples) / len(triples) + sum(fours) / len(fours)


@pytest.mark.parametrize("n", [4, 6, 7])  # an odd number of pairs at 6 and 7, so that the median is one of them
def test_equals_the_naive_sums(n):
    x, y = draw(n, 3, 2, seed=n)
    if n == 4:  # an even number of pairs: only the kernel's bandwidth convention would differ
        k, el = gaussian_kernel(x).tolist(), gaussian_kernel(y).tolist()
    else:
        k, el = plain_kernel(x), plain_kernel(y)
    found = dependence(x, y)
    assert found.hsic == pytest.approx(plain_hsic(k, el), abs=1e-14)
    own = plain_hsic(k, k) * plain_hsic(el, el)
    assert found.normalised == pytest.approx(plain_hsic(k, el) / math.sqrt(own), rel=1e-9)


def test_closed_form_of_two_points():
    """Four samples at two places: K is 1 at home and q = exp(-1/2) across, which gives (2/3) (1 - q)^2."""
    x = torch.tensor([[0.0], [0.0], [5.0], [5.0]])
    found = dependence(x, x)
    assert found.hsic == pytest.approx(2 / 3 * (1 - math.exp(-0.5)) ** 2, rel=1e-12)
    assert found.normalised == pytest.approx(1.0)
    crossed = dependence(x, x[[0, 2, 1, 3]])
    assert crossed.hsic == pytest.approx(-1 / 3 * (1 - math.exp(-0.5)) ** 2, rel=1e-12)


def test_mean_over_all_pairings_is_zero():
    """Every pairing equally likely is independence: the estimator's mean is then 0 exactly, not just about."""
    x, y = draw(5, 2, 3)
    values = [dependence(x, y[list(order)]).hsic for order in permutations(range(5))]
    assert sum(values) / len(values) == pytest.approx(0.0, abs=1e-15)
    assert max(values) > 1e-3


def test_mean_over_independent_draws_is_zero_and_the_biased_one_is_not():
    values, biased = [], []
    for seed in range(400):
        x, y = draw(12, 2, 2, seed=seed)
        values.append(dependence(x, y).hsic)
        k, el = gaussian_kernel(x), gaussian_kernel(y)
        centre = torch.eye(12, dtype=torch.float64) - 1 / 12
        biased.append(float((centre @ k @ centre * el).sum()) / 12**2)
    values = torch.tensor(values)
    error = float(values.std()) / math.sqrt(len(values))
    assert abs(float(values.mean())) < 3 * error
    assert sum(biased) / len(biased) > 30 * error


def test_finds_dependence_that_correlation_misses():
    x = torch.linspace(-1, 1, 101, dtype=torch.float64)[:, None]
    y = x.square()
    assert abs(float(torch.corrcoef(torch.cat([x, y], 1).T)[0, 1])) < 1e-12
    (noise,) = draw(101, 1, seed=3)
    assert dependence(x, y).normalised > 0.3 > 10 * abs(dependence(x, noise).normalised)


def test_invariances():
    x, y = draw(20, 4, 3)
    y[:, 0] += x[:, 0]
    want = dependence(x, y)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(1))
    turn, _ = torch.linalg.qr(draw(4, 4, seed=2)[0])
    same = [
        dependence(x[order], y[order]),  # the order of the samples
        dependence(x @ turn, y),  # a rotation
        dependence(x * 1e-4 - 7, y * 1e4),  # scale, by the bandwidth, and place
        dependence(y, x),
    ]
    for found in same:
        assert found == pytest.approx(want, rel=1e-9)
    assert dependence(x, y[order]).hsic != pytest.approx(want.hsic, rel=0.1)
    assert dependence(x, x @ turn).normalised == pytest.approx(1.0)


def test_a_set_that_does_not_vary_depends_on_nothing():
    x, _ = draw(9, 2, 1)
    assert dependence(x, torch.full((9, 3), 0.1)) == pytest.approx((0.0, 0.0), abs=1e-15)


def test_most_samples_equal_still_has_a_bandwidth():
    x = torch.zeros(9, 2)
    x[:2] = 3.0
    assert dependence(x, x).normalised == pytest.approx(1.0)
    x[1] = 0.0  # a lone outlier has no company to depend with: its U-centred kernel is 0 everywhere
    assert dependence(x, x) == pytest.approx((0.0, 0.0), abs=1e-15)


@pytest.mark.parametrize(
    ("x", "y"),
    [
        (torch.zeros(3, 2), torch.zeros(3, 2)),
        (torch.zeros(5, 2), torch.zeros(6, 2)),
        (torch.zeros(5), torch.zeros(5)),
        (torch.zeros(5, 1), torch.full((5, 1), math.nan)),
    ],
)
def test_refuses(x, y):
    with pytest.raises(ValueError, match="dependence"):
        dependence(x, y)
