"""A checkpoint folder of shards as one ordinary file, which any number of processes resumes from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from lit_reason.core.checkpoint_io import WholeFileIO
from lit_reason.errors import UserError
from lit_reason.strategies.checkpoint_folder import META
from lit_reason.strategies.optimizer_names import number_parameters


def consolidate(folder: Path, out: Path) -> dict[str, Any]:
    """Gather the shards of a checkpoint.

    Args:
        folder: written by `fsdp2` (or Lightning's `ModelParallelStrategy`).
        out: the file to write; it appears whole or not at all. Needs room for the checkpoint twice while it is made.

    Returns:
        The checkpoint, as written.

    Raises:
        UserError: `folder` is no finished checkpoint folder, or `out` exists.
    """
    if not folder.exists():
        raise UserError(f"no such folder: {folder}")
    if folder.is_file():
        raise UserError(f"{folder} is a file: an ordinary checkpoint needs no consolidation")
    if not (folder / ".metadata").is_file() or not (folder / META).is_file():
        raise UserError(f"{folder}: not a checkpoint folder of shards, or one that was never finished")
    if out.exists():
        raise UserError(f"{out} exists already: give another name, or remove it")
    out.parent.mkdir(parents=True, exist_ok=True)
    gathered = out.with_name(f".{out.name}.gathered")
    try:
        try:
            dcp_to_torch_save(folder, gathered)
        except (CheckpointException, FileNotFoundError) as error:
            raise UserError(f"{folder}: shards are missing or broken ({str(error).splitlines()[0]})") from error
        shards = torch.load(gathered, map_location="cpu", weights_only=True, mmap=True)
        checkpoint: dict[str, Any] = torch.load(folder / META, map_location="cpu", weights_only=True)
        if "state_dict" not in shards:
            raise UserError(f"{folder}: holds no `state_dict`; it was not written by ModelParallelStrategy")
        numbers = sorted(int(name.removeprefix("optimizer_")) for name in shards if name.startswith("optimizer_"))
        checkpoint["state_dict"] = shards["state_dict"]
        checkpoint["optimizer_states"] = [number_parameters(shards[f"optimizer_{n}"]) for n in numbers]
        WholeFileIO().save_checkpoint(checkpoint, out)
    finally:
        gathered.unlink(missing_ok=True)
    return checkpoint
