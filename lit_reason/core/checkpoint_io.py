"""Checkpoint files that appear whole or not at all."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.utilities.cloud_io import _is_local_file_protocol

from lit_reason.errors import UserError
from lit_reason.strategies.checkpoint_folder import UNFINISHED, force_to_disk, remove

PART = ".part"  # ending of a file that is still being written
DISK = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG}


class WholeFileIO(TorchCheckpointIO):
    """Writes a checkpoint beside its final name, forces it to the disk, and renames it.

    A kill, a full disk or a loss of power leaves the file of that name as it was before. Paths that are not local
    go Lightning's way.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write one file.

        Args:
            checkpoint: what to save.
            path: the file.
            storage_options: refused, as in Lightning.

        Raises:
            OSError: it could not be written; nothing of it is left, and what was there before still is.
        """
        if storage_options is not None or not _is_local_file_protocol(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f".{target.name}.{os.getpid()}{PART}")
        try:
            with part.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, target)
        except BaseException as error:
            part.unlink(missing_ok=True)
            cause = disk_error(error)
            if cause is None:
                raise
            what = f"{os.strerror(cause)}; the checkpoint was not written, earlier ones are untouched"
            raise OSError(cause, what, str(target)) from error
        force_to_disk(target.parent)

    def load_checkpoint(
        self, path: Any, map_location: Any = lambda storage, _: storage, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read one file.

        Args:
            path: the file.
            map_location: where tensors go, as in `torch.load`; default: the CPU.
            weights_only: load without running pickled code.

        Returns:
            What was saved.

        Raises:
            UserError: the file is broken, or something else than a checkpoint.
        """
        try:
            content = super().load_checkpoint(path, map_location, weights_only)
        except MemoryError:
            raise
        except Exception as error:  # torch raises whatever the damaged bytes happen to lead to
            if isinstance(error, OSError) and error.errno != errno.EINVAL:  # a seek outside of a file cut short
                raise
            raise UserError(f"{path}: not a checkpoint, or a broken one ({_first_line(error)})") from error
        for part in ("state_dict", "pytorch-lightning_version"):
            if not isinstance(content, dict) or part not in content:
                raise UserError(f"{path}: not a checkpoint of a run: it has no {part}")
        return content


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def disk_error(error: BaseException | None) -> int | None:
    """The error number of the disk behind an error, which torch may have wrapped in one of its own.

    Args:
        error: what was raised.

    Returns:
        An entry of `DISK`, or None.
    """
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, OSError) and error.errno in DISK:
            return error.errno
        error = error.__cause__ or error.__context__
    return None


def clear_parts(folder: Path) -> None:
    """Remove what a killed process left unfinished. Nobody else may be writing into the folder."""
    for ending in (PART, UNFINISHED):
        for part in folder.glob(f".*{ending}"):
            remove(part)
