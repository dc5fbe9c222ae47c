"""Linear layers whose weight is `scale * B A^T`, or that plus a sparse matrix, without ever holding the weight.

Shapes: T tokens, N inputs, M outputs, R rank, K nonzero entries. A is [N, R] and B is [M, R]: both factors lie along
their long side, which is the side that sharding cuts.

`lowrank_linear` costs 2 T R (M + N) floating-point operations forward. For the backward pass it keeps the input,
which a dense layer keeps too, and the R-wide middle.

`sparse_lowrank_linear` (SLTrain, arXiv 2406.02214) adds a sparse part with fixed, random positions. A product with
such a matrix is slow on every device, so blocks of rows of the whole weight are built and multiplied densely, one
block after the other, forward and again backward: 2 T M N operations as in a dense layer, memory of one block. The
gradient of the sparse values is gathered from the block's dense gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK_ROWS = 512  # rows of the weight that exist at a time


def lowrank_linear(x: Tensor, in_factor_NR: Tensor, out_factor_MR: Tensor, scale: float = 1.0) -> Tensor:
    """`y = scale * (x A) B^T`.

    Args:
        x: inputs, [..., N].
        in_factor_NR: A, [N, R].
        out_factor_MR: B, [M, R].
        scale: factor of the product, not trained.

    Returns:
        [..., M], in the dtype of the factors, or autocast's where that is on.
    """
    device = x.device.type
    inputs = _as_computed((x, in_factor_NR, out_factor_MR), device)
    with torch.autocast(device, enabled=False):
        return _LowRank.apply(*inputs, scale)


def sparse_lowrank_linear(
    x: Tensor,
    in_factor_NR: Tensor,
    out_factor_MR: Tensor,
    values_K: Tensor,
    positions_K: Tensor,
    scale: float = 1.0,
    *,
    edges: Sequence[int] | None = None,
) -> Tensor:
    """`y = x (scale * B A^T + S)^T`.

    Args:
        x: inputs, [..., N].
        in_factor_NR: A, [N, R].
        out_factor_MR: B, [M, R].
        values_K: nonzero entries of S, [K].
        positions_K: where they are in S laid out row by row: integers in [0, M * N), ascending, distinct, [K].
        scale: factor of the product, not trained.
        edges: `block_edges(positions_K, M, N)`; computed when absent, which waits for the device.

    Returns:
        [..., M], in the dtype of the factors, or autocast's where that is on.
    """
    device = x.device.type
    inputs = _as_computed((x, in_factor_NR, out_factor_MR, values_K), device)
    if edges is None:
        edges = block_edges(positions_K, len(out_factor_MR), len(in_factor_NR))
    with torch.autocast(device, enabled=False):
        return _SparseLowRank.apply(*inputs, positions_K, scale, tuple(edges))


def block_edges(positions_K: Tensor, rows: int, columns: int) -> list[int]:
    """Where each block of `BLOCK_ROWS` rows begins in the ascending positions, and K at the end.

    Args:
        positions_K: positions in a matrix laid out row by row, ascending.
        rows: of the matrix.
        columns: of the matrix.
    """
    starts = torch.arange(0, rows, BLOCK_ROWS, device=positions_K.device, dtype=torch.int64) * columns
    found = torch.searchsorted(positions_K, starts.to(positions_K.dtype))
    return [*found.tolist(), len(positions_K)]


def draw_positions(rows: int, columns: int, count: int) -> Tensor:
    """Distinct positions in a matrix, drawn uniformly, ascending.

    Args:
        rows: of the matrix.
        columns: of the matrix.
        count: how many.

    Returns:
        int32 [count]; int64 for matrices of 2^31 entries and more.
    """
    narrow = torch.int32 if rows * columns < 2**31 else torch.int64
    return torch.randperm(rows * columns)[:count].sort().values.to(narrow)


def _as_computed(tensors: Sequence[Tensor], device: str) -> list[Tensor]:
    """All in autocast's dtype where that is on, else in the dtype of the factors."""
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tensors[1].dtype
    return [tensor.to(dtype) for tensor in tensors]


class _LowRank(torch.autograd.Function):
    """Saves x and the scaled middle `scale * x A`; every product is with a matrix R wide."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, in_factor: Tensor, out_factor: Tensor, scale: float) -> Tensor:
        middle = x.matmul(in_factor).mul_(scale)
        ctx.scale = scale
        ctx.save_for_backward(x, middle, in_factor, out_factor)
        return middle.matmul(out_factor.t())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, middle, in_factor, out_factor = ctx.saved_tensors
        want_x, want_in, want_out, _ = ctx.needs_input_grad
        d_middle = dy.matmul(out_factor).mul_(ctx.scale)
        d_x = d_middle.matmul(in_factor.t()) if want_x else None
        d_in = _rows(x).t() @ _rows(d_middle) if want_in else None
        d_out = _rows(dy).t() @ _rows(middle) if want_out else None
        return d_x, d_in, d_out, None


class _SparseLowRank(torch.autograd.Function):
    """Builds the weight block by block of rows, forward and backward; saves x and the factors alone."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        in_factor: Tensor,
        out_factor: Tensor,
        values: Tensor,
        positions: Tensor,
        scale: float,
        edges: tuple[int, ...],
    ) -> Tensor:
        ctx.scale, ctx.edges = scale, edges
        ctx.save_for_backward(x, in_factor, out_factor, values, positions)
        x_TN = _rows(x)
        y_TM = x.new_empty(len(x_TN), len(out_factor))
        for rows, part, where in _blocks(positions, edges, len(out_factor), len(in_factor)):
            block = _block(in_factor, out_factor[rows], values[part], where, scale)
            y_TM[:, rows] = x_TN @ block.t()
        return y_TM.view(*x.shape[:-1], len(out_factor))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, in_factor, out_factor, values, positions = ctx.saved_tensors
        want_x, want_in, want_out, want_values = ctx.needs_input_grad[:4]
        x_TN, dy_TM = _rows(x), _rows(dy)
        d_x = torch.zeros_like(x_TN) if want_x else None
        d_values = torch.empty_like(values) if want_values else None
        for rows, part, where in _blocks(positions, ctx.edges, len(out_factor), len(in_factor)):
            dy_block = dy_TM[:, rows]
            if d_x is not None:
                d_x.addmm_(dy_block, _block(in_factor, out_factor[rows], values[part], where, ctx.scale))
            if d_values is not None:
                d_values[part] = (dy_block.t() @ x_TN).view(-1).index_select(0, where)
        d_in = x_TN.t() @ (dy_TM @ out_factor).mul_(ctx.scale) if want_in else None
        d_out = dy_TM.t() @ (x_TN @ in_factor).mul_(ctx.scale) if want_out else None
        d_x = None if d_x is None else d_x.view(x.shape)
        return d_x, d_in, d_out, d_values, None, None, None


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


def _blocks(positions: Tensor, edges: tuple[int, ...], rows: int, columns: int):
    """Slices of rows, the slices of the sparse values in them, and their positions within the block."""
    for number, (first, last) in enumerate(zip(edges, edges[1:], strict=False)):
        start = number * BLOCK_ROWS
        part = slice(first, last)
        yield slice(start, min(start + BLOCK_ROWS, rows)), part, positions[part] - start * columns


def _block(in_factor: Tensor, out_rows: Tensor, values: Tensor, where: Tensor, scale: float) -> Tensor:
    """Some rows of the weight, dense."""
    block = (out_rows * scale) @ in_factor.t()
    block.view(-1).index_add_(0, where, values)
    return block
