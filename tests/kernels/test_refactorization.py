"""Balanced factors against the full singular value decomposition of their product."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_reason.kernels.refactorization import balanced_split, refactorize


def unbalanced(m, n, r, *, batch=(), dtype=torch.float32, seed=0, decades=2.0):
    """Factors whose columns differ in scale by `decades` powers of ten, with B much larger than A."""
    g = torch.Generator().manual_seed(seed)
    scales = torch.logspace(0, decades, r, dtype=torch.float64)
    b = torch.randn(*batch, m, r, generator=g, dtype=torch.float64) * scales
    a = torch.randn(*batch, n, r, generator=g, dtype=torch.float64) / n
    return b.to(dtype), a.to(dtype)


def product(b, a):
    return b.double() @ a.double().mT


def gap(got, want):
    return float((got - want).norm() / want.norm())


@pytest.mark.parametrize("m, n, r", [(96, 64, 16), (64, 160, 32), (20, 20, 20), (5, 9, 1)])
def test_product_stays_and_factors_are_balanced_like_the_full_svd(m, n, r):
    b, a = unbalanced(m, n, r)
    new_b, new_a = refactorize(b, a)
    weight = product(b, a)
    assert gap(product(new_b, new_a), weight) < 1e-5
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    for gram in (new_b.mT @ new_b, new_a.mT @ new_a):
        assert gap(gram.double(), torch.diag(s[:r])) < 1e-5
    sign = u[:, :r].gather(0, u[:, :r].abs().argmax(0, keepdim=True)).sign()
    for got, vectors in ((new_b, u[:, :r]), (new_a, vh[:r].mT)):
        torch.testing.assert_close(
            got.double(), vectors * sign * s[:r].sqrt(), rtol=1e-3, atol=1e-4 * float(s[0] ** 0.5)
        )


def test_a_batch_is_its_matrices_one_by_one():
    b, a = unbalanced(24, 30, 6, batch=(2, 3))
    new_b, new_a = refactorize(b, a)
    for i in range(2):
        for j in range(3):
            one_b, one_a = refactorize(b[i, j], a[i, j])
            torch.testing.assert_close(new_b[i, j], one_b)
            torch.testing.assert_close(new_a[i, j], one_a)


def test_balanced_factors_stay_as_they_are():
    b, a = refactorize(*unbalanced(40, 30, 8, dtype=torch.float64))
    again_b, again_a = refactorize(b, a)
    torch.testing.assert_close(again_b, b)
    torch.testing.assert_close(again_a, a)


def test_signs_do_not_depend_on_those_of_the_factors():
    b, a = unbalanced(40, 30, 8)
    flip = torch.tensor([1.0, -1.0] * 4)
    for got, want in zip(refactorize(b * flip, a * flip), refactorize(b, a), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)
    new_b, _ = refactorize(b, a)
    assert (new_b.gather(0, new_b.abs().argmax(0, keepdim=True)) > 0).all()


@pytest.mark.parametrize("which", ["B has equal columns", "A has a zero column", "B is zero"])
def test_factors_without_full_rank_are_safe(which):
    b, a = unbalanced(20, 30, 6, decades=0.0)
    if which.startswith("B has"):
        b[:, 1] = b[:, 0]
    elif which.startswith("A has"):
        a[:, 2] = 0
    else:
        b.zero_()
    new_b, new_a = refactorize(b, a)
    assert new_b.isfinite().all() and new_a.isfinite().all()
    torch.testing.assert_close(product(new_b, new_a), product(b, a), rtol=0, atol=1e-5)
    torch.testing.assert_close(new_b.mT @ new_b, new_a.mT @ new_a, rtol=0, atol=1e-5)


def test_bfloat16_loses_the_rounding_of_its_storage_and_no_more():
    b, a = unbalanced(128, 96, 32, dtype=torch.bfloat16, decades=1.0)
    new_b, new_a = refactorize(b, a)
    assert new_b.dtype == new_a.dtype == torch.bfloat16
    wide_b, wide_a = refactorize(b.float(), a.float())
    rounding = gap(product(wide_b.bfloat16(), wide_a.bfloat16()), product(b, a))
    assert gap(product(new_b, new_a), product(b, a)) == pytest.approx(rounding, rel=1e-3)


def test_values_that_are_not_finite_are_refused():
    b, a = unbalanced(20, 30, 6)
    b[3, 2] = float("nan")
    with pytest.raises(torch.linalg.LinAlgError):
        refactorize(b, a)


def test_split_keeps_the_largest_singular_values():
    core = torch.diag(torch.tensor([1.0, 9.0, 4.0])).double()
    left, right = balanced_split(core, rank=2)
    assert left.shape == right.shape == (3, 2)
    torch.testing.assert_close(left @ right.mT, torch.diag(torch.tensor([0.0, 9.0, 4.0])).double())


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.data())
def test_any_shape(m, n, data):
    b, a = unbalanced(m, n, data.draw(st.integers(1, min(m, n))), dtype=torch.float64)
    new_b, new_a = refactorize(b, a)
    torch.testing.assert_close(product(new_b, new_a), product(b, a), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(new_b.mT @ new_b, new_a.mT @ new_a, rtol=1e-7, atol=1e-7)
