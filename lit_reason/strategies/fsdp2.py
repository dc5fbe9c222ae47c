"""`trainer.strategy: fsdp2`: weights, gradients and optimizer state in shards, one part on each process."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from lit_reason.errors import UserError
from lit_reason.strategies.checkpoint_folder import META, UNFINISHED, beside, put_in_place, remove
from lit_reason.strategies.optimizer_names import name_parameters, number_parameters


class FSDP2Strategy(ModelParallelStrategy):
    """Fully sharded data parallelism, with checkpoints that any number of processes reads.

    What it adds to Lightning's class: sizes that fit every run; checkpoints of adapters (their frozen base is not
    in the file); single files whose optimizer state is numbered as an ordinary optimizer numbers it; and folders
    that appear whole or not at all.

    Args:
        tensor_parallel_size: processes that share the matrices of one copy of the model, besides the sharding; they
            see the same rows. The product with the number of copies is the number of processes.
        save_distributed_checkpoint: each process writes its part into a folder (`lit-reason consolidate` makes one
            file of it); False gathers everything on the first process, which writes one ordinary file.
        process_group_backend: how processes talk; default by device (nccl, gloo).
        timeout: how long a process waits for the others.
    """

    strategy_name = "fsdp2"

    def __init__(
        self,
        tensor_parallel_size: int = 1,
        save_distributed_checkpoint: bool = True,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
    ) -> None:
        super().__init__(1, tensor_parallel_size, save_distributed_checkpoint, process_group_backend, timeout)

    def setup_environment(self) -> None:
        """Count the processes before the mesh is made.

        Raises:
            UserError: they cannot be dealt into groups of `tensor_parallel_size`.
        """
        processes, size = self.num_nodes * self.num_processes, int(self._tensor_parallel_size)
        if size < 1 or processes % size:
            raise UserError(f"strategy: tensor_parallel_size {size} does not divide {processes} processes")
        self._data_parallel_size = processes // size
        super().setup_environment()

    # ---- saving ----

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The optimizer's state: by parameter name for a folder, numbered for a file."""
        inner = optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        assert self.model is not None
        options = StateDictOptions(full_state_dict=not self._save_distributed_checkpoint, cpu_offload=True)
        state = get_optimizer_state_dict(self.model, inner, options=options)
        return state if self._save_distributed_checkpoint or not state else number_parameters(state)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """Write a folder under another name and rename it when all of it is there; or one file."""
        target = Path(self.broadcast(filepath))
        if not self._save_distributed_checkpoint:
            super().save_checkpoint(checkpoint, target, storage_options)
            return
        unfinished = beside(target, UNFINISHED)
        if self.is_global_zero:
            remove(unfinished)
        self.barrier()
        super().save_checkpoint(checkpoint, unfinished, storage_options)
        self.barrier()
        if self.is_global_zero:
            put_in_place(unfinished, target)
        self.barrier()

    # ---- loading ----

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read weights and optimizer state into the shards, from a folder or a file of any number of processes.

        Args:
            checkpoint_path: the folder or file.
            weights_only: load without running pickled code.

        Returns:
            What else is in the checkpoint.

        Raises:
            UserError: it is of another recipe; nothing was changed.
        """
        path = Path(self.broadcast(checkpoint_path))
        if path.is_dir():
            return self._load_folder(path, weights_only)
        checkpoint = torch.load(path, mmap=True, map_location="cpu", weights_only=weights_only)
        weights = checkpoint.pop("state_dict")
        self._check({name: value.shape for name, value in weights.items() if hasattr(value, "shape")})
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=self._strict)
        assert self.model is not None
        set_model_state_dict(self.model, weights, options=options)
        for optimizer, state in zip(self.optimizers, checkpoint.get("optimizer_states", []), strict=False):
            named = name_parameters(state, _names(self.model, optimizer))
            set_optimizer_state_dict(self.model, optimizer, optim_state_dict=named, options=options)
        return checkpoint

    @property
    def _strict(self) -> bool:
        assert self.lightning_module is not None
        return self.lightning_module.strict_loading

    def _load_folder(self, path: Path, weights_only: bool | None) -> dict[str, Any]:
        if not (path / ".metadata").is_file() or not (path / META).is_file():
            raise UserError(f"{path}: not a checkpoint folder, or one that was never finished")
        assert self.model is not None
        entries = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
        prefix = "state_dict."
        self._check({n.removeprefix(prefix): e.size for n, e in entries.items() if n.startswith(prefix)})  # type: ignore[union-attr]
        wanted = get_model_state_dict(self.model, options=StateDictOptions(ignore_frozen_params=not self._strict))
        weights = {"state_dict": {name: v for name, v in wanted.items() if prefix + name in entries}}
        dcp.load(weights, checkpoint_id=path)
        set_model_state_dict(self.model, weights["state_dict"], options=StateDictOptions(strict=self._strict))
        for index, optimizer in enumerate(self.optimizers):
            state = {f"optimizer_{index}": get_optimizer_state_dict(self.model, optimizer)}
            dcp.load(state, checkpoint_id=path)
            set_optimizer_state_dict(self.model, optimizer, optim_state_dict=state[f"optimizer_{index}"])
        return torch.load(path / META, map_location="cpu", weights_only=weights_only)

    def _check(self, found: Mapping[str, torch.Size]) -> None:
        expected = getattr(self.lightning_module, "check_weights", None)
        if expected is not None:
            expected(found)


def _names(model: torch.nn.Module, optimizer: Optimizer) -> list[str]:
    """Names of the optimizer's parameters in its own order."""
    known = {id(p): name for name, p in model.named_parameters()}
    return [known[id(p)] for group in optimizer.param_groups for p in group["params"]]


if "fsdp2" not in StrategyRegistry:
    StrategyRegistry.register("fsdp2", FSDP2Strategy, description="FSDP2: everything in shards, over all processes")
