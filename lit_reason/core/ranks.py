"""Small exchanges between the processes of a run."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist


def from_all_ranks(value: Any) -> list[Any]:
    """What every process holds, in rank order. All processes must call this together.

    Args:
        value: this process's value; must pickle.

    Returns:
        One entry a process; `[value]` in a run of one process.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
