"""How rows are cut into chunks, and how a chunk's product joins the sum of the weight's gradient on a GPU."""

import pytest
import torch

from lit_reason.kernels import chunks
from lit_reason.kernels.chunks import parts_of, rows_of_a_chunk

GPU = torch.device("cuda")


@pytest.mark.parametrize(
    "V, dtype, heads, rows",
    [
        (128256, torch.bfloat16, 1, 4096),  # Llama 3: 1 GiB is 4185 rows
        (128256, torch.bfloat16, 2, 2048),
        (128256, torch.float32, 1, 2048),
        (151936, torch.bfloat16, 1, 3456),
        (49152, torch.bfloat16, 1, 8192),  # more rows would not make the products faster
        (2_000_000, torch.bfloat16, 1, 1024),  # fewer would make them slow
    ],
)
def test_rows_on_a_gpu_follow_the_budget(V, dtype, heads, rows):
    assert rows_of_a_chunk(16384, V, GPU, dtype, heads) == rows
    assert rows_of_a_chunk(900, V, GPU, dtype, heads) == (900 if 900 * V * dtype.itemsize * heads <= 2**30 else rows)


def test_parts_are_equal_and_cover_all_rows():
    for S, rows in [(0, 5), (1, 5), (10, 5), (11, 5), (4097, 4096)]:
        sizes = [part.stop - part.start for part in parts_of(S, rows)]
        assert sum(sizes) == S and max(sizes, default=0) <= rows
        assert max(sizes, default=0) - min(sizes, default=0) <= len(sizes)


@pytest.mark.parametrize("in_place", [True, False])
def test_a_wide_product_is_not_rounded_and_needs_little_memory(in_place, monkeypatch):
    """Stands in for the GPU's mixed products on a CPU: operands of 16 bits, result of 32."""
    mm, addmm, sizes = torch.mm, torch.addmm, []

    def mixed(a, b, out_dtype):
        assert out_dtype == torch.float32 and a.dtype == b.dtype == torch.bfloat16
        sizes.append(len(a))
        return mm(a.float(), b.float())

    monkeypatch.setattr(torch, "mm", mixed)
    monkeypatch.setattr(
        torch, "addmm", lambda total, a, b, out_dtype, out: addmm(total, a.to(out_dtype), b.to(out_dtype), out=out)
    )
    monkeypatch.setattr(chunks, "_adds_wide", lambda device, dtype: in_place)
    monkeypatch.setattr(chunks, "WIDE_PRODUCT_BYTES", 10 * 8 * 4)  # ten rows of total
    draw = torch.Generator().manual_seed(0)
    a, b = (torch.randn(*shape, generator=draw).bfloat16() for shape in ((37, 50), (50, 8)))
    total = torch.randn(37, 8, generator=draw)
    want = total.double() + a.double() @ b.double()
    chunks._add_wide_product_(total, a, b)
    torch.testing.assert_close(total.double(), want, rtol=1e-5, atol=1e-5)
    assert sizes == [] if in_place else (sum(sizes) == 37 and max(sizes) <= 10)
