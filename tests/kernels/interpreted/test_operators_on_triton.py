"""The table of operations with Triton's row passes between the products."""

import pytest
import torch
from operators import BY_NAME, OPERATORS, Case, check

from lit_reason.errors import UserError
from lit_reason.kernels.dispatch import backends_used
from lit_reason.kernels.head_loss import linear_token_loss

FAMILY = ("token_logprobs", "nll", "total", "fkl", "jsd 0.1")  # one of each kind of pass


@pytest.mark.parametrize("operator", OPERATORS, ids=lambda o: o.name)
def test_operator_in_float32(operator):
    check(operator, Case(S=9, V=40, dtype=torch.float32, chunk_rows=4, backend="triton"))
    assert "triton" in "".join(backends_used().values())


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_operator_in_16_bits(name, dtype):
    """Products in 16 bits are torch's own on a CPU; no kernel of ours multiplies matrices."""
    check(BY_NAME[name], Case(S=9, V=40, dtype=dtype, scale=0.3, chunk_rows=4, backend="triton"))


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize(
    "settings",
    [{"temperature": 0.3}, {"softcap": 5.0, "temperature": 2.0}, {"scale": 1e3}, {"bias": False, "V": 7}, {"S": 1}],
    ids=str,
)
def test_operator_with_settings(name, settings):
    check(
        BY_NAME[name],
        Case(**{"S": 5, "V": 33, "dtype": torch.float32, "chunk_rows": 3, "backend": "triton"} | settings),
    )


def test_triton_does_not_compute_in_float64():
    x = torch.zeros(2, 3, dtype=torch.float64)
    with pytest.raises(UserError, match="backend is 'triton', but it does not compute in torch.float64"):
        linear_token_loss(x, x, torch.zeros(2, dtype=torch.long), torch.ones(2), backend="triton")
