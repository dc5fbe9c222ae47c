"""Arguments of the head-loss family: what does not fit together is refused by name before anything is computed.

Values are looked at where that costs no wait for a device: on a CPU they raise, on a GPU an assertion joins the queue.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lit_reason.errors import UserError


class Checks:
    """Checks of one call.

    Args:
        op: name of the operation, which begins each message.
    """

    def __init__(self, op: str):
        self.op = op

    def need(self, ok: bool, name: str, given: object, allowed: str) -> None:
        """Refuse an argument.

        Args:
            ok: whether it is all right.
            name: the argument.
            given: what it is.
            allowed: what it must be.
        """
        if not ok:
            raise UserError(f"{self.op}: {name} is {given}; it must be {allowed}")

    def head(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, suffix: str = "") -> None:
        """Hidden states, weight and bias of one head.

        Args:
            hidden: rows.
            weight: head weight.
            bias: head bias.
            suffix: end of the arguments' names, where there are two heads.
        """
        hidden_SD, weight_VD = f"hidden{suffix}_SD", f"weight{suffix}_VD"
        self.need(not isinstance(hidden, DTensor), hidden_SD, "a DTensor", "a local tensor (`to_local()`)")
        self.need(hidden.ndim == 2, hidden_SD, f"of shape {tuple(hidden.shape)}", "[S, D]")
        D = hidden.shape[1]
        fits = weight.ndim == 2 and weight.shape[1] == D and weight.shape[0] > 0
        self.need(fits, weight_VD, f"of shape {tuple(weight.shape)}", f"[V, {D}] with V > 0")
        for name, tensor in ((hidden_SD, hidden), (weight_VD, weight)):
            self.need(tensor.is_floating_point(), name, f"of dtype {tensor.dtype}", "a floating-point tensor")
        self.same_device(hidden, **{weight_VD: weight})
        if bias is not None:
            name, V = f"bias{suffix}", weight.shape[0]
            self.need(bias.shape == (V,), name, f"of shape {tuple(bias.shape)}", f"[{V}]")
            self.need(bias.is_floating_point(), name, f"of dtype {bias.dtype}", "a floating-point tensor")
            self.same_device(hidden, **{name: bias})

    def same_device(self, hidden: Tensor, **others: Tensor) -> None:
        """All tensors are where the rows are.

        Args:
            hidden: rows.
            **others: tensors by name.
        """
        for name, tensor in others.items():
            self.need(tensor.device == hidden.device, name, f"on {tensor.device}", f"on {hidden.device} like the rows")

    def weights(self, hidden: Tensor, token_weight: Tensor) -> None:
        """One finite weight a row.

        Args:
            hidden: rows.
            token_weight: weight of each row.
        """
        name, S, w = "token_weight_S", hidden.shape[0], token_weight
        self.need(w.is_floating_point(), name, f"of dtype {w.dtype}", "a floating-point tensor")
        self.need(w.shape == (S,), name, f"of shape {tuple(w.shape)}", f"[{S}], one entry per row")
        self.same_device(hidden, token_weight_S=w)
        self._finite(name, w)

    def targets(self, hidden: Tensor, targets: Tensor) -> None:
        """Targets fit the rows; `target_values` looks at what they are.

        Args:
            hidden: rows.
            targets: token of each row.
        """
        S, integers = hidden.shape[0], (torch.int64, torch.int32)
        self.need(targets.dtype in integers, "targets_S", f"of dtype {targets.dtype}", "int64 or int32")
        self.need(targets.shape == (S,), "targets_S", f"of shape {tuple(targets.shape)}", f"[{S}], one entry per row")
        self.same_device(hidden, targets_S=targets)

    def target_values(self, targets: Tensor, V: int | Tensor) -> None:
        """Every target is a token of the vocabulary.

        Args:
            targets: token of each row.
            V: vocabulary; on a device, where its size is known there alone.
        """
        self._range("targets_S", targets, V)

    def rows(self, index: Tensor, hidden: Tensor) -> None:
        """An index of rows.

        Args:
            index: positions of the rows that are taken.
            hidden: all rows.
        """
        good = index.ndim == 1 and index.dtype in (torch.int64, torch.int32)
        self.need(good, "index_S", f"{index.dtype} of shape {tuple(index.shape)}", "[S] of int64 or int32")
        self.same_device(hidden, index_S=index)
        if not torch.compiler.is_compiling():
            self._range("index_S", index, hidden.shape[0])

    def settings(
        self,
        temperature: float,
        chunk_rows: int | None,
        logits_dtype: torch.dtype | None,
        **softcaps: float | None,
    ) -> None:
        """Numbers that say how a head is computed.

        Args:
            temperature: divisor of the logits.
            chunk_rows: rows of a chunk, or None.
            logits_dtype: dtype of the logits, or None.
            **softcaps: bounds of the logits, or None, by argument name.
        """
        good = math.isfinite(temperature) and temperature > 0
        self.need(good, "temperature", temperature, "a positive number")
        for name, softcap in softcaps.items():
            good = softcap is None or (math.isfinite(softcap) and softcap > 0)
            self.need(good, name, softcap, "None or positive")
        self.need(chunk_rows is None or chunk_rows >= 1, "chunk_rows", chunk_rows, "None or at least 1")
        self.need(logits_dtype in (None, torch.float32), "logits_dtype", logits_dtype, "None or torch.float32")

    def _finite(self, name: str, values: Tensor) -> None:
        fine = torch.isfinite(values)
        if values.device.type == "cpu":
            bad = int((~fine).sum())
            self.need(not bad, name, f"NaN or infinite in {bad} of {len(values)} rows", "finite")
        elif values.device.type == "cuda":
            torch._assert_async(fine.all(), f"{self.op}: {name} is NaN or infinite in some rows; it must be finite")

    def _range(self, name: str, values: Tensor, stop: int | Tensor) -> None:
        if not values.numel():
            return
        if values.device.type == "cpu":
            low, high = int(values.min()), int(values.max())
            self.need(0 <= low and bool(high < stop), name, f"in [{low}, {high}]", f"in [0, {int(stop)})")
        elif values.device.type == "cuda":
            inside = ((values >= 0) & (values < stop)).all()
            torch._assert_async(inside, f"{self.op}: {name} has entries that are too large or negative")
