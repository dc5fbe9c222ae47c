"""Low-rank and sparse-plus-low-rank linear layers against the dense weight they stand for."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from lit_reason.kernels import lowrank
from lit_reason.kernels.lowrank import block_edges, draw_positions, lowrank_linear, sparse_lowrank_linear

N, M, R, T = 7, 11, 3, 5


def make(dtype=torch.float64, *, n=N, m=M, r=R, t=(T,), k=13, seed=0):
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_()  # noqa: E731
    torch.manual_seed(seed)
    return draw(*t, n), draw(n, r), draw(m, r), draw(k), draw_positions(m, n, k)


def dense_weight(a, b, scale, values=None, positions=None):
    weight = scale * b @ a.t()
    if values is not None:
        weight = weight.flatten().index_put((positions.long(),), values, accumulate=True).view_as(weight)
    return weight


@pytest.mark.parametrize("shape", [(T,), (2, 3)])
def test_lowrank_equals_the_product_with_the_dense_weight(shape):
    x, a, b, _, _ = make(t=shape)
    torch.testing.assert_close(lowrank_linear(x, a, b, 0.7), x @ dense_weight(a, b, 0.7).t())
    assert torch.autograd.gradcheck(lambda *args: lowrank_linear(*args, 0.7), (x, a, b))


@pytest.mark.parametrize("rows", [1, 4, 11, 512])
@pytest.mark.parametrize("count", [0, 1, 13, N * M])
def test_sparse_equals_the_product_with_the_dense_weight_whatever_the_block(monkeypatch, rows, count):
    monkeypatch.setattr(lowrank, "BLOCK_ROWS", rows)
    x, a, b, values, positions = make(t=(2, 3), k=count)
    y = sparse_lowrank_linear(x, a, b, values, positions, 0.7)
    torch.testing.assert_close(y, x @ dense_weight(a, b, 0.7, values, positions).t())
    ours = torch.autograd.grad(y.square().sum(), (x, a, b, values))
    want = (x @ dense_weight(a, b, 0.7, values, positions).t()).square().sum()
    for got, expected in zip(ours, torch.autograd.grad(want, (x, a, b, values)), strict=True):
        torch.testing.assert_close(got, expected)


def test_sparse_gradients_by_finite_differences():
    x, a, b, values, positions = make()
    call = lambda *args: sparse_lowrank_linear(*args, positions, 0.7)  # noqa: E731
    assert torch.autograd.gradcheck(call, (x, a, b, values))


@pytest.mark.parametrize("frozen", range(4))
def test_only_wanted_gradients_are_computed(frozen):
    x, a, b, values, positions = make()
    leaves = [x, a, b, values]
    leaves[frozen].requires_grad_(False)
    sparse_lowrank_linear(*leaves, positions).sum().backward()
    assert [leaf.grad is None for leaf in leaves] == [i == frozen for i in range(4)]
    if frozen < 3:
        for leaf in leaves:
            leaf.grad = None
        lowrank_linear(x, a, b).sum().backward()
        assert [leaf.grad is None for leaf in (x, a, b)] == [i == frozen for i in range(3)]


def saved_sizes(call):
    """Elements of every tensor kept for the backward pass."""
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        call()
    return sorted(sizes)


def test_only_input_middle_and_factors_are_kept():
    x, a, b, values, positions = make(torch.float32, n=70, m=110, r=3, t=(50,), k=13)
    assert saved_sizes(lambda: lowrank_linear(x, a, b, 0.5)) == sorted([50 * 70, 50 * 3, 70 * 3, 110 * 3])
    kept = saved_sizes(lambda: sparse_lowrank_linear(x, a, b, values, positions, 0.5))
    assert kept == sorted([50 * 70, 70 * 3, 110 * 3, 13, 13])


class Largest(TorchDispatchMode):
    """The most elements in one result of any operation."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.parametrize("sparse", [False, True])
def test_nothing_of_the_size_of_the_weight_is_ever_made(monkeypatch, sparse):
    monkeypatch.setattr(lowrank, "BLOCK_ROWS", 8)
    n, m, t = 60, 80, 4
    x, a, b, values, positions = make(torch.float32, n=n, m=m, t=(t,), k=99)
    edges = block_edges(positions, m, n)
    with Largest() as seen:
        y = sparse_lowrank_linear(x, a, b, values, positions, edges=edges) if sparse else lowrank_linear(x, a, b)
        y.sum().backward()
    assert seen.elements == (8 * n if sparse else t * m)


def test_positions_are_distinct_ascending_and_uniform():
    torch.manual_seed(0)
    drawn = torch.stack([draw_positions(4, 5, 6) for _ in range(2000)])
    assert drawn.dtype == torch.int32 and (drawn.diff(dim=1) > 0).all()
    counts = torch.bincount(drawn.flatten().long(), minlength=20)
    assert counts.sum() == 12000 and (counts - 600).abs().max() < 6 * (600 * 0.7) ** 0.5


def test_autocast_and_half_precision():
    x, a, b, values, positions = make(torch.float32, t=(40,))
    want = x @ dense_weight(a, b, 0.7, values, positions).t()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = sparse_lowrank_linear(x, a, b, values, positions, 0.7)
        z = lowrank_linear(x, a, b, 0.7)
    assert y.dtype == z.dtype == torch.bfloat16
    assert (y.float() - want).norm() < 0.02 * want.norm()
    (y.float() * want.detach()).sum().backward()
    assert values.grad.dtype == a.grad.dtype == x.grad.dtype == torch.float32
    expected = torch.autograd.grad((want * want.detach()).sum(), (x, a, b, values))
    for leaf, grad in zip((x, a, b, values), expected, strict=True):
        assert (leaf.grad - grad).norm() < 0.03 * grad.norm()
    assert lowrank_linear(x.detach(), a.bfloat16(), b.bfloat16()).dtype == torch.bfloat16  # factors decide


def test_under_compile_without_graph_break():
    x, a, b, _, _ = make(torch.float32)
    compiled = torch.compile(lambda *args: lowrank_linear(*args, 0.7), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, a, b), lowrank_linear(x, a, b, 0.7))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 4), st.integers(0, 6), st.data())
def test_any_shape(n, m, r, t, data):
    x, a, b, values, positions = make(n=n, m=m, r=r, t=(t,), k=data.draw(st.integers(0, n * m)))
    torch.testing.assert_close(lowrank_linear(x, a, b), x @ dense_weight(a, b, 1.0).t())
    y = sparse_lowrank_linear(x, a, b, values, positions)
    torch.testing.assert_close(y, x @ dense_weight(a, b, 1.0, values, positions).t())
