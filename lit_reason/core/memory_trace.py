"""The memory of an optimizer step, found by running it on tensors without data.

The model, a micro-batch and the optimizer are made of fake tensors (torch's `FakeTensorMode`): every operation of a
real step on a CPU is called and gives a tensor of the right shape and dtype, but nothing is computed or allocated. What
lives when is read off the storages. So the plan needs no memory of the size it predicts, and follows the code instead
of a formula that would have to be kept in step with it.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lit_reason.core.optim import build_optimizer
from lit_reason.data.packing import Pack


@dataclass(frozen=True)
class StepMemory:
    """Bytes on one device.

    Attributes:
        parameters: number of parameters, a tied one counted once.
        trained: number of those that training changes.
        weights: parameters and buffers.
        gradients: of all trained parameters.
        optimizer: its state.
        activations: what the forward pass holds for the backward pass, the gradient of the output layer among it.
        peak: the most that lives at one moment of a step, not the first one.
    """

    parameters: int
    trained: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    peak: int


class LiveBytes(TorchDispatchMode):
    """Bytes in storages that operations made and that still live.

    Numbers that the program reads off a tensor without data (is it finite, is it in range) are what a healthy run
    would read: true, 0, or 1.0.

    Attributes:
        now: bytes.
        peak: the most so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and count what it made."""
        if func is torch.ops.aten._local_scalar_dense.default:
            dtype = args[0].dtype
            return True if dtype == torch.bool else 1.0 if dtype.is_floating_point else 0
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes()
        self._known[key] = weakref.ref(storage, lambda _: self._drop(key, size))
        self.now += size
        self.peak = max(self.peak, self.now)

    def _drop(self, key: int, size: int) -> None:
        del self._known[key]
        self.now -= size


def trace_step(
    regime: Any, lengths: Sequence[int], *, accumulate: int = 1, autocast: torch.dtype | None = None
) -> StepMemory:
    """Run a step without data and see what it holds.

    Args:
        regime: its `lm` is built on the meta device, and stays a model without data.
        lengths: tokens of each row of a micro-batch.
        accumulate: micro-batches of a step.
        autocast: dtype of the products under mixed precision; None computes in the dtype of the weights.

    Returns:
        The sizes, on one device that holds everything.
    """
    boundaries = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)  # real numbers: attention reads them
    with FakeTensorMode(allow_non_fake_inputs=True), LiveBytes() as live:
        regime.lm.to_empty(device="cpu")
        weights = live.now
        trained = [p for p in regime.lm.parameters() if p.requires_grad]
        gradients = sum(p.numel() * p.element_size() for p in trained)
        optimizer = build_optimizer(regime, regime.optim_config)
        for parameter in trained:
            parameter.grad = torch.empty_like(parameter)
        optimizer.step()
        state = live.now - weights - gradients
        optimizer.zero_grad()
        live.peak = live.now
        activations = 0
        for _ in range(min(accumulate, 2)):  # the second finds gradients of the first
            pack = _pack(lengths, boundaries)
            before = live.now
            with torch.autocast("cpu", dtype=autocast) if autocast is not None else nullcontext():
                loss = regime.score(pack).loss_sum
            activations = live.now - before
            loss.backward()
            del loss
        optimizer.step()
        counts = regime.lm.parameter_counts()
        return StepMemory(counts.total, counts.trainable, weights, gradients, state, activations, live.peak)


def _pack(lengths: Sequence[int], boundaries: Tensor) -> Pack:
    """A micro-batch of the right shape in which every token but the first of each row is predicted."""
    tokens, predicted = sum(lengths), sum(lengths) - len(lengths)
    long, short = torch.int64, torch.uint8
    return Pack(
        ids=torch.empty(tokens, dtype=long),
        positions=torch.empty(tokens, dtype=long),
        cu_seqlens=boundaries,
        lengths=tuple(lengths),
        weight=torch.empty(tokens),
        segment=torch.empty(tokens, dtype=short),
        decile=torch.empty(tokens, dtype=torch.int8),
        index=torch.empty(predicted, dtype=long),
        targets=torch.empty(predicted, dtype=long),
        target_weight=torch.empty(predicted),
        target_segment=torch.empty(predicted, dtype=short),
        target_decile=torch.empty(predicted, dtype=torch.int8),
        row_ids=("",) * len(lengths),
        norm=float(predicted),
    )
