"""Which backend runs, what is said about it, and that nothing waits for a device."""

import logging

import pytest
import torch
from operators import OPERATORS, Case, inputs_of, settings_of
from torch.utils._python_dispatch import TorchDispatchMode

from lit_reason.errors import UserError
from lit_reason.kernels import dispatch
from lit_reason.kernels.dispatch import backends_used, resolve, row_passes

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """No record of earlier runs, and no wishes of the environment."""
    monkeypatch.setattr(dispatch, "_used", {})
    monkeypatch.setattr(dispatch, "_said", set())
    monkeypatch.delenv("LIT_REASON_KERNELS", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def test_a_gpu_runs_triton_and_a_cpu_runs_torch(monkeypatch):
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name: object())
    assert resolve("op", "auto", CUDA, torch.bfloat16) == "triton"
    assert resolve("op", "auto", CPU, torch.float32) == "torch"
    assert resolve("other", "reference", CPU, torch.float32) == "reference"
    assert backends_used() == {"op": "torch, triton", "other": "reference"}


def test_a_gpu_without_triton_says_so_once(monkeypatch, caplog):
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name: None)
    with caplog.at_level(logging.WARNING):
        assert [resolve("op", "auto", CUDA, torch.float32) for _ in range(3)] == ["torch"] * 3
    (record,) = caplog.records
    assert "op runs its row passes in torch, which is slower: triton is not installed" in record.getMessage()
    with pytest.raises(UserError, match="op: backend is 'triton', but triton is not installed"):
        resolve("op", "triton", CUDA, torch.float32)


def test_double_precision_on_a_gpu_is_torchs(monkeypatch, caplog):
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name: object())
    assert resolve("op", "auto", CUDA, torch.float64) == "torch"
    assert "does not compute in torch.float64" in caplog.text


def test_the_environment_names_the_default_alone(monkeypatch):
    monkeypatch.setenv("LIT_REASON_KERNELS", "reference")
    assert resolve("op", "auto", CPU, torch.float32) == "reference"
    assert resolve("op", "torch", CPU, torch.float32) == "torch"
    monkeypatch.setenv("LIT_REASON_KERNELS", "refrence")
    with pytest.raises(UserError, match=r"LIT_REASON_KERNELS is 'refrence'.*did you mean 'reference'"):
        resolve("op", "auto", CPU, torch.float32)


def test_backends_have_the_same_functions():
    names = ("row_stats", "row_grad_", "divergence_stats", "divergence_grad_")
    assert all(callable(getattr(row_passes("torch"), name)) for name in names)


class Waits(TorchDispatchMode):
    """Counts operations that bring a number from a device to the host."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("operator", OPERATORS, ids=[operator.name for operator in OPERATORS])
def test_no_operation_waits_for_a_device(operator, monkeypatch):
    """But for checks of values, which on a GPU join the queue, and the upstream factor, read on a CPU alone."""
    monkeypatch.setattr("lit_reason.kernels.checks.Checks._range", lambda *args: None)
    monkeypatch.setattr("lit_reason.kernels.checks.Checks._finite", lambda *args: None)
    case = Case(softcap=3.0)
    x = {k: v.requires_grad_(k == "hidden") for k, v in inputs_of(case).items()} | {"softcap": 3.0}
    with Waits() as forward:
        loss = operator.call(x, settings_of(case))["loss"]
    assert forward.count == 0
    with Waits() as backward:
        loss.backward()
    assert backward.count <= 1
