"""Which backend runs an operation of the head-loss family, and a record of which ones did.

`reference` materialises all logits and differentiates with autograd: slow, plain, for tests. `torch` and `triton` run
the same chunked loop around different row passes. `auto` takes triton on a GPU whose machine has it, else torch;
the environment variable LIT_REASON_KERNELS names another default.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
from types import ModuleType

import torch

from lit_reason.errors import UserError, did_you_mean

log = logging.getLogger(__name__)

BACKENDS = ("auto", "torch", "triton", "reference")
TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_used: dict[str, set[str]] = {}
_said: set[str] = set()


def resolve(op: str, backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """The backend that runs `op`, noted for `backends_used`.

    Args:
        op: name of the operation, for messages and the record.
        backend: what the caller asked for, one of `BACKENDS`.
        device: where the tensors are.
        dtype: of the logits.

    Returns:
        `reference`, `torch` or `triton`.

    Raises:
        UserError: no such backend, or triton was asked for by name and cannot run here.
    """
    source = "backend"
    if backend == "auto" and (forced := os.environ.get("LIT_REASON_KERNELS")):
        backend, source = forced, "LIT_REASON_KERNELS"
    if backend not in BACKENDS:
        raise UserError(
            f"{op}: {source} is '{backend}'; allowed: {', '.join(BACKENDS)}{did_you_mean(backend, BACKENDS)}"
        )
    if backend in ("auto", "triton"):
        reason = _no_triton(device, dtype)
        if reason and backend == "triton":
            raise UserError(f"{op}: {source} is 'triton', but {reason}; use 'auto' or 'torch'")
        if reason and device.type == "cuda" and reason not in _said:
            _said.add(reason)
            log.warning("%s runs its row passes in torch, which is slower: %s", op, reason)
        backend = "torch" if reason else "triton"
    _used.setdefault(op, set()).add(backend)
    return backend


def _no_triton(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why triton cannot run, or None. On a CPU it runs under its interpreter alone (TRITON_INTERPRET=1)."""
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"the tensors are on {device}"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (extra `gpu`)"
    return None if dtype in TRITON_DTYPES else f"it does not compute in {dtype}"


def row_passes(backend: str) -> ModuleType:
    """The module with the row passes of a resolved backend.

    Args:
        backend: `torch` or `triton`.
    """
    if backend == "triton":
        return importlib.import_module("lit_reason.kernels.triton_rows")
    return importlib.import_module("lit_reason.kernels.row_passes")


def backends_used() -> dict[str, str]:
    """What has run in this process: operation -> backends, joined by commas. A run's report shows it."""
    return {op: ", ".join(sorted(names)) for op, names in sorted(_used.items())}
