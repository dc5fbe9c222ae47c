"""The table of operations with Triton's row passes: chunked, selected, weighted, in every dtype they compute in."""

import pytest
import torch
from operators import BY_NAME, OPERATORS, Case, check

from lit_reason.errors import UserError
from lit_reason.kernels.dispatch import backends_used
from lit_reason.kernels.head_loss import linear_token_loss

SMALL = Case(S=7, V=65, dtype=torch.float32, chunk_rows=3, backend="triton")
CASES = [
    pytest.param(SMALL._replace(softcap=8.0), id="float32"),
    pytest.param(SMALL._replace(dtype=torch.float16, temperature=0.7, scale=0.25), id="float16"),
    pytest.param(SMALL._replace(dtype=torch.bfloat16, softcap=3.0, scale=0.25), id="bfloat16"),
]
FAMILY = ("token_logprobs", "nll", "total", "fkl", "jsd 0.1")  # together, every row pass; the other operations are slow
TABLE = [pytest.param(op, id=op.name, marks=[] if op.name in FAMILY else pytest.mark.slow) for op in OPERATORS]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("operator", TABLE)
def test_forward_and_backward(operator, case, monkeypatch):
    """16-bit products are torch's own on a CPU: no kernel here multiplies matrices."""
    monkeypatch.setattr("lit_reason.kernels.dispatch._used", {})
    check(operator, case)
    assert set(backends_used().values()) == {"triton"}


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("settings", [{"temperature": 0.3}, {"scale": 1e3}, {"bias": False, "V": 7}, {"S": 1}], ids=str)
def test_settings(name, settings):
    check(BY_NAME[name], SMALL._replace(**{"S": 4, "V": 33, **settings}))


def test_triton_does_not_compute_in_float64():
    x = torch.zeros(2, 3, dtype=torch.float64)
    with pytest.raises(UserError, match="backend is 'triton', but it does not compute in torch.float64"):
        linear_token_loss(x, x, torch.zeros(2, dtype=torch.long), torch.ones(2), backend="triton")
