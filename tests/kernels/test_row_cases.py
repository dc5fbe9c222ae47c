"""The torch row passes on the table that the Triton kernels are held to."""

import pytest
import row_cases
import torch
from row_cases import CASES, KINDS, check_divergence, check_statistics

from lit_reason.kernels import row_passes

DTYPES = [torch.float64, torch.float32, torch.bfloat16]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_statistics(name, dtype):
    it = row_cases.rounded(CASES[name](0), dtype)
    check_statistics(row_passes, it, with_entropy=False)
    check_statistics(row_passes, it, with_entropy=True)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_divergences(name, dtype):
    it = row_cases.rounded(CASES[name](0), dtype)
    for kind, beta in KINDS:
        check_divergence(row_passes, it, kind, beta)
