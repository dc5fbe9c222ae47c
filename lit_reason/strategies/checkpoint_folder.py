"""Checkpoint folders of shards that appear whole or not at all, also in the place of an older one."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

OLD = (
    ".old"  # ending of a folder that a newer one is about to replace; a name with it is no longer looked at after that
)
UNFINISHED = ".unfinished"  # ending of a folder that is still being written
META = "meta.pt"  # Lightning's file beside the shards: loops, callbacks, schedules


def beside(target: Path, ending: str) -> Path:
    """The hidden name in the same folder under which a checkpoint lies before or after it has its own.

    Args:
        target: the checkpoint's name.
        ending: `OLD` or `UNFINISHED`.
    """
    return target.with_name(f".{target.name}{ending}")


def put_in_place(finished: Path, target: Path) -> None:
    """Give a finished folder its name. A kill at any moment leaves a whole folder under `target` or beside it.

    Args:
        finished: all of it is written.
        target: its name; a folder or file that has it now is removed in the end.
    """
    force_to_disk(finished / META)
    force_to_disk(finished)
    old = beside(target, OLD)
    if target.exists():  # else `old` may be all there is: a kill came between the two renames
        remove(old)
        os.replace(target, old)
    os.replace(finished, target)
    force_to_disk(target.parent)
    remove(old)


def left_behind(folder: Path) -> list[Path]:
    """Whole checkpoints whose name was taken from them by a save that a kill broke off.

    Args:
        folder: of checkpoints.
    """
    return [old for old in folder.glob(f".*.ckpt{OLD}") if not old.with_name(old.name[1 : -len(OLD)]).exists()]


def remove(path: Path) -> None:
    """Remove a file or a folder with all in it; nothing is fine too.

    Args:
        path: what is no longer wanted.
    """
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def force_to_disk(path: Path) -> None:
    """Write a file's bytes, or a folder's names, to the disk, so that they outlive a loss of power.

    Args:
        path: a file or folder.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot, and need not
            raise
    finally:
        os.close(handle)
