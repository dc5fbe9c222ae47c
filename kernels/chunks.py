"""The loop that every operation of the head-loss family runs: products with the head, a chunk of rows at a time.

Shapes: S rows, D width, V vocabulary.

A chunk's logits, their row passes and their gradient products are finished before the next chunk starts, in buffers
allocated once, so memory is `rows * V` instead of `S * V`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial

from lit_reason.kernels.dispatch import resolve
from lit_reason.kernels.row_passes import Transform

ROWS_ON_CPU = 512
CUDA_CHUNK_BYTES = 2**30
WIDE_PRODUCT_BYTES = 2**28  # of a float32 product that is added to a sum afterwards, where torch cannot do both in one


class Settings(NamedTuple):
    """How a head is computed.

    Args:
        softcap: bound of the logits, or None.
        inverse_temperature: factor on the logits.
        compute: dtype of the operands of the products.
        logits: dtype of a chunk of logits in memory.
        rows: most rows of a chunk.
        backend: `reference`, `torch` or `triton`.
    """

    softcap: float | None
    inverse_temperature: float
    compute: torch.dtype
    logits: torch.dtype
    rows: int
    backend: str

    @property
    def stats(self) -> torch.dtype:
        """Dtype of log-probabilities, losses and sums over chunks."""
        return torch.float64 if self.logits == torch.float64 else torch.float32


def settings_of(
    op: str,
    S: int,
    weight: Tensor,
    temperature: float,
    softcap: float | None,
    chunk_rows: int | None,
    logits_dtype: torch.dtype | None,
    backend: str,
    heads: int = 1,
) -> Settings:
    """Fill in what the caller left open. Products are in the head weight's dtype, or in autocast's where that is on.

    Args:
        op: name of the operation.
        S: rows there are.
        weight: head weight.
        temperature: divisor of the logits.
        softcap: bound of the logits, or None.
        chunk_rows: rows of a chunk, or None.
        logits_dtype: float32 to keep the logits of 16-bit products unrounded, or None for the products' dtype.
        backend: what the caller asked for.
        heads: chunks of logits alive at the same time.
    """
    device, compute = weight.device, weight.dtype
    if torch.is_autocast_enabled(device.type) and compute != torch.float64:
        compute = torch.get_autocast_dtype(device.type)
    logits = torch.promote_types(compute, logits_dtype or compute)
    backend = resolve(op, backend, device, logits)
    rows = chunk_rows or rows_of_a_chunk(S, weight.shape[0], device, logits, heads)
    return Settings(softcap, 1.0 / temperature, compute, logits, rows, backend)


def rows_of_a_chunk(S: int, V: int, device: torch.device, dtype: torch.dtype, heads: int) -> int:
    """Rows per chunk: few on a CPU to save memory, on a GPU enough to keep the products near peak.

    Args:
        S: rows there are.
        V: vocabulary.
        device: where the logits will be.
        dtype: of the logits.
        heads: chunks of logits alive at the same time.
    """
    if device.type != "cuda":
        return ROWS_ON_CPU
    rows = CUDA_CHUNK_BYTES // (heads * V * dtype.itemsize)
    return S if S <= rows else min(max(rows // 128 * 128, 1024), 8192)


def parts_of(S: int, rows: int) -> list[slice]:
    """Ranges of at most `rows` rows that cover S; equal ones, instead of a small last one.

    Args:
        S: rows there are.
        rows: most rows of a part.
    """
    count = math.ceil(S / rows)
    size = math.ceil(S / count) if count else 0
    return [slice(start, min(start + size, S)) for start in range(0, S, size)] if count else []


def whole(weight: Tensor) -> Tensor:
    """A head weight that lies in shards over processes, gathered; its gradient is summed over them.

    Args:
        weight: a tensor, or a DTensor on every process of its mesh.
    """
    if not isinstance(weight, DTensor):
        return weight
    return weight.full_tensor(grad_placements=[Partial() for _ in weight.placements])


class HeadChunks:
    """The products of one head with chunks of rows.

    Args:
        hidden: rows, [S, D].
        weight: head weight, [V, D].
        bias: head bias, [V], or None; it is in `transform`, not in the products.
        settings: dtypes, and most rows of a chunk.
        wanted: whether gradients of hidden, weight and bias are summed.

    Attributes:
        parts: the chunks, as ranges of rows.
        wanted: whether any gradient is.
        settings: as given.
        transform: from products to logits, for the row passes.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        settings: Settings,
        wanted: Sequence[bool] = (False, False, False),
    ):
        (S, D), V = hidden.shape, weight.shape[0]
        self.parts, self.wanted, self.settings = parts_of(S, settings.rows), any(wanted), settings
        added = None if bias is None else bias.detach()
        self.transform = Transform(added, settings.softcap, settings.inverse_temperature)
        self._hidden, self._weight_dtype, self._bias = hidden.detach(), weight.dtype, bias
        self._weight = weight.detach().to(settings.compute)
        # A CPU has no product of 16-bit operands with an unrounded result: there the operands are widened.
        self._factor = self._weight if hidden.device.type == "cuda" else self._weight.to(settings.logits)
        # Rows that begin at a multiple of 16 logits: Triton's row passes then move 128 bits at a time.
        width = -(-V // 16) * 16 if settings.backend == "triton" else V
        self._logits = hidden.new_empty((self.parts[0].stop if self.parts else 0, width), dtype=settings.logits)[:, :V]
        want_hidden, want_weight, want_bias = wanted
        self._d_hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format) if want_hidden else None
        self._d_bias = hidden.new_zeros(V, dtype=settings.stats) if want_bias else None
        self._d_weight = hidden.new_zeros((V, D), dtype=settings.stats) if want_weight else None

    def logits(self, part: slice, hidden: Tensor | None = None) -> Tensor:
        """Products of a chunk with the head, [rows, V], in a buffer that the next call writes over.

        Args:
            part: one of `parts`.
            hidden: other rows to take the chunk from, [S, D].
        """
        x = (self._hidden if hidden is None else hidden.detach())[part].to(self._factor.dtype)
        z = self._logits[: x.shape[0]]
        if z.dtype == self._factor.dtype:
            return torch.mm(x, self._factor.t(), out=z)
        return torch.mm(x, self._factor.t(), out_dtype=z.dtype, out=z)

    def add_gradients(self, part: slice, dz: Tensor) -> None:
        """Add what a chunk contributes to the gradients that are wanted.

        Args:
            part: one of `parts`.
            dz: gradient with respect to the chunk's logits.
        """
        if self._d_bias is not None:
            self._d_bias.add_(dz.sum(0, dtype=self._d_bias.dtype))
        dz = dz.to(self.settings.compute)
        if self._d_hidden is not None:
            if self._d_hidden.dtype == dz.dtype:
                torch.mm(dz, self._weight, out=self._d_hidden[part])
            else:
                self._d_hidden[part] = torch.mm(dz, self._weight)
        if self._d_weight is not None:
            _add_product_(self._d_weight, dz.t(), self._hidden[part].to(dz.dtype))

    def gradients(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of hidden, weight and bias in their dtypes; None for those that nobody wanted."""
        d_weight, d_bias = self._d_weight, self._d_bias
        if d_weight is not None:
            d_weight = d_weight.to(self._weight_dtype)
        if d_bias is not None and self._bias is not None:
            d_bias = d_bias.to(self._bias.dtype)
        return self._d_hidden, d_weight, d_bias


def _add_product_(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b. The total of 16-bit products is kept in float32: rounding it chunk by chunk would bias training."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif total.device.type == "cuda":
        _add_wide_product_(total, a, b)
    else:
        total.add_(torch.mm(a, b))


def _add_wide_product_(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b on a GPU, for 16-bit a and b: nothing is rounded to 16 bits, nothing as large as total is made."""
    if _adds_wide(total.device, a.dtype):
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
        return
    for part in parts_of(len(total), max(1, WIDE_PRODUCT_BYTES // (total.shape[1] * total.itemsize))):
        total[part].add_(torch.mm(a[part], b, out_dtype=total.dtype))


@functools.cache
def _adds_wide(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this torch adds a product of 16-bit operands to a float32 matrix in place; older ones do not."""
    total, operand = torch.zeros(16, 16, device=device), torch.ones(16, 16, dtype=dtype, device=device)
    try:
        torch.addmm(total, operand, operand, out_dtype=total.dtype, out=total)
    except RuntimeError:
        return False
    return True
