"""The table of operations with Triton's row passes: chunked, selected, weighted, in every dtype they compute in."""

import operators
import pytest
import torch
from operators import OPERATORS, Case, check

from lit_reason.kernels.dispatch import backends_used

SMALL = Case(S=7, V=65, chunk_rows=3, backend="triton")
CASES = [
    pytest.param(SMALL._replace(dtype=torch.float32, softcap=8.0), id="float32"),
    pytest.param(SMALL._replace(dtype=torch.float16, temperature=0.7), id="float16", marks=pytest.mark.slow),
    pytest.param(SMALL._replace(dtype=torch.bfloat16, softcap=3.0), id="bfloat16", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("operator", OPERATORS, ids=[operator.name for operator in OPERATORS])
def test_forward_and_backward(operator, case, monkeypatch):
    monkeypatch.setitem(operators.TOLERANCE, torch.float16, 5e-3)
    monkeypatch.setattr("lit_reason.kernels.dispatch._used", {})
    check(operator, case if case.dtype == torch.float32 else case._replace(scale=0.25))
    assert set(backends_used().values()) == {"triton"}
