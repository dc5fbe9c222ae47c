"""Run one function in two processes that talk by gloo, forked so that nothing is imported twice."""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

# A model that is split: two layers, an output layer of its own.
TINY = {
    "model_type": "qwen3",
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
}


def run(work: Callable[..., Any], folder: Path, *args: Any, world: int = 2, timeout: float = 240) -> list[Any]:
    """What `work(*args)` returns in each process, in rank order; the environment is that of torchrun.

    Args:
        work: called in each process; its result must be something `torch.save` writes.
        folder: where results go.
        *args: handed to `work`.
        world: number of processes.
        timeout: seconds before the processes are killed.
    """
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    context = multiprocessing.get_context("fork")
    ranks = range(world)
    children = [context.Process(target=_child, args=(rank, world, port, folder, work, args)) for rank in ranks]
    for child in children:
        child.start()
    for child in children:
        child.join(timeout)
    stuck = [child for child in children if child.is_alive()]
    for child in stuck:
        child.kill()
        child.join()
    errors = [(folder / f"error-{rank}.txt") for rank in ranks]
    said = "\n".join(file.read_text() for file in errors if file.exists())
    assert not stuck and not said and all(child.exitcode == 0 for child in children), said or "processes hung"
    return [torch.load(folder / f"result-{rank}.pt", weights_only=False) for rank in ranks]


def _child(rank: int, world: int, port: int, folder: Path, work: Callable[..., Any], args: tuple) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        GROUP_RANK="0",
        WORLD_SIZE=str(world),
        LOCAL_WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_RUN_ID="test",
    )
    torch.set_num_threads(1)
    try:
        torch.save(work(*args), folder / f"result-{rank}.pt")
    except BaseException:
        (folder / f"error-{rank}.txt").write_text(f"rank {rank}\n{traceback.format_exc()}")
        os._exit(1)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    os._exit(0)
