"""Arguments that do not fit together are refused by name; odd ones that make sense give right answers."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from operators import BY_NAME, OPERATORS, Case, check, inputs_of
from torch._subclasses import FakeTensorMode

from lit_reason.errors import UserError
from lit_reason.kernels.chunks import CUDA_CHUNK_BYTES, ROWS_ON_CPU, parts_of, rows_of_a_chunk
from lit_reason.kernels.divergence import linear_divergence
from lit_reason.kernels.head_loss import linear_token_loss
from lit_reason.kernels.token_logprobs import token_logprobs

LOGPROBS, LOSS, DIVERGENCE = token_logprobs, linear_token_loss, linear_divergence
POSITIONAL = {
    LOGPROBS: ("hidden_SD", "weight_VD", "targets_S"),
    LOSS: ("hidden_SD", "weight_VD", "targets_S", "token_weight_S"),
    DIVERGENCE: ("hidden_s_SD", "weight_s_VD", "hidden_t_SD", "weight_t_VD", "token_weight_S"),
}
HEADS, WEIGHTED, TARGETED = (LOGPROBS, LOSS), (LOSS, DIVERGENCE), (LOGPROBS, LOSS)
EVERY = (LOGPROBS, LOSS, DIVERGENCE)


def arguments(op):
    """Five rows of width 8, a vocabulary of 7, and a teacher of width 6."""
    x = {
        "hidden_SD": torch.zeros(5, 8),
        "weight_VD": torch.zeros(7, 8),
        "hidden_s_SD": torch.zeros(5, 8),
        "weight_s_VD": torch.zeros(7, 8),
        "hidden_t_SD": torch.zeros(5, 6),
        "weight_t_VD": torch.zeros(7, 6),
        "targets_S": torch.arange(5),
        "token_weight_S": torch.ones(5),
    }
    return {name: x[name] for name in POSITIONAL[op]} | ({"kind": "fkl"} if op is DIVERGENCE else {})


BAD = [
    (HEADS, {"hidden_SD": torch.zeros(5)}, r"hidden_SD is of shape \(5,\); it must be \[S, D\]"),
    (HEADS, {"hidden_SD": torch.zeros(5, 8, dtype=torch.long)}, "hidden_SD is of dtype torch.int64"),
    (HEADS, {"weight_VD": torch.zeros(7, 9)}, r"weight_VD is of shape \(7, 9\); it must be \[V, 8\]"),
    (HEADS, {"weight_VD": torch.zeros(0, 8)}, r"weight_VD is of shape \(0, 8\); it must be \[V, 8\] with V > 0"),
    (HEADS, {"weight_VD": torch.zeros(7, 8, device="meta")}, "weight_VD is on meta; it must be on cpu"),
    (HEADS, {"weight_VD": torch.zeros(7, 8).int()}, "weight_VD is of dtype torch.int32"),
    (HEADS, {"bias": torch.zeros(8)}, r"bias is of shape \(8,\); it must be \[7\]"),
    (HEADS, {"bias": torch.zeros(7).long()}, "bias is of dtype torch.int64"),
    (HEADS, {"softcap": -1.0}, "softcap is -1.0; it must be None or positive"),
    (TARGETED, {"targets_S": torch.arange(4)}, r"targets_S is of shape \(4,\); it must be \[5\]"),
    (TARGETED, {"targets_S": torch.zeros(5)}, "targets_S is of dtype torch.float32; it must be int64 or int32"),
    (TARGETED, {"targets_S": torch.tensor([0, 1, 2, 3, 7])}, r"targets_S is in \[0, 7\]; it must be in \[0, 7\)"),
    (TARGETED, {"targets_S": torch.tensor([0, 1, 2, 3, -100])}, r"targets_S is in \[-100, 3\]"),
    (WEIGHTED, {"token_weight_S": torch.zeros(5).long()}, "token_weight_S is of dtype torch.int64"),
    (WEIGHTED, {"token_weight_S": torch.zeros(5, 1)}, r"token_weight_S is of shape \(5, 1\)"),
    (WEIGHTED, {"token_weight_S": torch.tensor([0, 1, 2, math.nan, math.inf])}, "NaN or infinite in 2 of 5 rows"),
    ((LOSS,), {"hidden_ref_SD": torch.zeros(5, 9)}, r"hidden_ref_SD is .*; it must be .*\(5, 8\) like hidden_SD"),
    (EVERY, {"temperature": 0.0}, "temperature is 0.0; it must be a positive number"),
    (EVERY, {"temperature": math.nan}, "temperature is nan"),
    (EVERY, {"chunk_rows": 0}, "chunk_rows is 0; it must be None or at least 1"),
    (EVERY, {"logits_dtype": torch.float16}, "logits_dtype is torch.float16; it must be None or torch.float32"),
    (EVERY, {"index_S": torch.tensor([0, 5])}, r"index_S is in \[0, 5\]; it must be in \[0, 5\)"),
    (EVERY, {"index_S": torch.tensor([0.5])}, r"index_S is torch.float32 of shape \(1,\)"),
    (
        EVERY,
        {"backend": "tritn"},
        r"backend is 'tritn'; allowed: auto, torch, triton, reference \(did you mean 'triton'",
    ),
    ((DIVERGENCE,), {"hidden_t_SD": torch.zeros(4, 6)}, "hidden_t_SD is 4 rows; it must be 5 rows like hidden_s_SD"),
    ((DIVERGENCE,), {"weight_t_VD": torch.zeros(8, 6)}, "weight_t_VD is a head of 8 tokens; it must be one of 7"),
    ((DIVERGENCE,), {"kind": "fk"}, r"kind is 'fk'; it must be fkl, rkl, jsd \(did you mean 'fkl'\?\)"),
    ((DIVERGENCE,), {"kind": "jsd", "beta": 1.0}, "beta is 1.0; it must be between 0 and 1"),
    ((DIVERGENCE,), {"softcap_t": 0.0}, "softcap_t is 0.0"),
]


@pytest.mark.parametrize("ops, change, message", BAD, ids=[message[:40] for _, _, message in BAD])
def test_wrong_arguments_are_named(ops, change, message):
    for op in ops:
        x = arguments(op) | change
        positional = [x.pop(name) for name in POSITIONAL[op]]
        with pytest.raises(UserError, match=f"^{op.__name__}: .*{message}"):
            op(*positional, **x)


def test_triton_by_name_needs_a_place_to_run(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(UserError, match="backend is 'triton', but the tensors are on cpu; use 'auto' or 'torch'"):
        linear_token_loss(**arguments(LOSS), backend="triton")


def test_a_vocabulary_of_no_round_number():
    for V in (2, 3, 251, 49152 + 3):
        check(BY_NAME["nll"], Case(S=3, D=4, V=V))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("operator", OPERATORS, ids=[operator.name for operator in OPERATORS])
def test_no_rows(operator, dtype):
    x = inputs_of(Case(S=0, dtype=dtype)) | {"softcap": None}
    hidden, weight = (x[name].requires_grad_() for name in ("hidden", "weight"))
    loss = operator.call(x | {"hidden": hidden, "weight": weight}, {})["loss"]
    assert loss.item() == 0.0
    loss.backward()
    assert hidden.grad.shape == (0, 8) and torch.equal(weight.grad, torch.zeros_like(weight))


def test_targets_of_32_bits():
    x = inputs_of(Case()) | {"softcap": None}
    narrow = x | {"targets": x["targets"].int()}
    for name in ("token_logprobs", "nll"):
        assert torch.equal(BY_NAME[name].call(narrow, {})["loss"], BY_NAME[name].call(x, {})["loss"])


@given(S=st.integers(0, 2**40), rows=st.integers(1, 2**33))
def test_chunks_cover_every_row_once_and_are_equal(S, rows):
    rows = max(rows, S // 1000 + 1)
    parts = parts_of(S, rows)
    assert sum(part.stop - part.start for part in parts) == S
    assert all(a.stop == b.start for a, b in zip(parts, parts[1:], strict=False))
    assert not parts or (parts[0].start, parts[-1].stop) == (0, S)
    sizes = [part.stop - part.start for part in parts]
    assert all(0 < size <= rows for size in sizes)
    assert len(parts) <= -(-S // rows) and len(set(sizes[:-1])) <= 1


@given(S=st.integers(1, 2**24), V=st.integers(1, 2**20), heads=st.integers(1, 2))
def test_rows_of_a_chunk_on_a_gpu(S, V, heads):
    cuda, size = torch.device("cuda"), torch.bfloat16.itemsize
    rows = rows_of_a_chunk(S, V, cuda, torch.bfloat16, heads)
    assert rows == S or (1024 <= rows <= 8192 and rows % 128 == 0)
    if rows > 1024:
        assert heads * rows * V * size <= CUDA_CHUNK_BYTES
    if heads * S * V * size <= CUDA_CHUNK_BYTES:
        assert rows == S
    assert rows_of_a_chunk(S, V, torch.device("cpu"), torch.bfloat16, heads) == ROWS_ON_CPU


def test_more_than_2_to_the_31_logits():
    """Shapes alone, as compilers see the operation: 2^36 logits of 16k rows; nothing here is of that size."""
    with FakeTensorMode():
        hidden, weight = torch.empty(2**14, 8, requires_grad=True), torch.empty(2**22, 8, requires_grad=True)
        out = token_logprobs(hidden, weight, torch.empty(2**14, dtype=torch.long))
        out.logp_S.sum().backward()
        assert out.logp_S.shape == (2**14,) and weight.grad.shape == weight.shape


@pytest.mark.slow
def test_more_than_2_to_the_31_logits_in_one_chunk():
    """One chunk of 2^31 + 2^17 bfloat16 logits (4 GiB): the last row is right."""
    V, S = 2**17, 2**14 + 1
    hidden = torch.zeros(S, 1, dtype=torch.bfloat16)
    hidden[-1] = 1.0
    weight = torch.zeros(V, 1, dtype=torch.bfloat16)
    weight[5] = 8.0
    out = token_logprobs(hidden, weight, torch.full((S,), 5), chunk_rows=S)
    assert out.logp_S[0].item() == pytest.approx(-math.log(V))
    assert out.logp_S[-1].item() == pytest.approx(8 - math.log(V - 1 + math.exp(8)), rel=1e-5)
