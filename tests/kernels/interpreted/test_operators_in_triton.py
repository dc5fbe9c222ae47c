"""The table of operations with Triton's row passes: chunked, selected, weighted, in every dtype they compute in."""

import operators
import pytest
import torch
from operators import OPERATORS, Case, check

from lit_reason.kernels.dispatch import backends_used

SMALL = Case(S=7, V=65, chunk_rows=3, backend="triton")
ALWAYS = ("token_logprobs", "total", "rkl", "jsd 0.5")  # in float32; the rest is slow
CASES = {
    "float32": SMALL._replace(dtype=torch.float32, softcap=8.0),
    "float16": SMALL._replace(dtype=torch.float16, temperature=0.7, scale=0.25),
    "bfloat16": SMALL._replace(dtype=torch.bfloat16, softcap=3.0, scale=0.25),
}
TABLE = [
    pytest.param(
        operator,
        case,
        id=f"{operator.name}-{dtype}",
        marks=[] if operator.name in ALWAYS and dtype == "float32" else pytest.mark.slow,
    )
    for operator in OPERATORS
    for dtype, case in CASES.items()
]


@pytest.mark.parametrize("operator, case", TABLE)
def test_forward_and_backward(operator, case, monkeypatch):
    monkeypatch.setitem(operators.TOLERANCE, torch.float16, 5e-3)
    monkeypatch.setattr("lit_reason.kernels.dispatch._used", {})
    check(operator, case)
    assert set(backends_used().values()) == {"triton"}
