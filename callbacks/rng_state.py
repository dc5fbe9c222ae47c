"""RngState: random states in the checkpoint, so that a resumed run continues bit for bit."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from lit_reason.core.ranks import from_all_ranks


class RngState(Callback):
    """Saves the random states of torch (CPU and CUDA), numpy and Python with every checkpoint.

    Lightning restores weights, optimizer, schedule and loop counters, but no random state: with dropout the
    losses after a resume differ although the data are the same. The states of all processes are saved, each
    process takes back its own. They hold tensors and plain numbers alone, so checkpoints load with
    `weights_only=True`.
    """

    def __init__(self) -> None:
        self._pending: list[dict[str, Any]] | None = None

    def state_dict(self) -> dict[str, Any]:
        """The random states of all processes, in rank order (all processes must call this together)."""
        return {"ranks": from_all_ranks(rng_states())}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the states of a checkpoint until training starts.

        Args:
            state_dict: what `state_dict` returned.
        """
        self._pending = state_dict["ranks"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore here: what runs between loading and training (model set-up, sanity check) draws numbers
        too."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        if len(pending) != trainer.world_size:
            rank_zero_warn(
                f"The checkpoint is of {len(pending)} processes and this run has {trainer.world_size}: "
                "random states were not restored, so dropout will differ from an uninterrupted run."
            )
            return
        restore_rng_states(pending[trainer.global_rank])


def rng_states() -> dict[str, Any]:
    """The random states of this process as tensors, numbers, lists and strings."""
    version, words, gauss = random.getstate()
    numpy_state: Any = np.random.get_state(legacy=False)
    states: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": [version, list(words), gauss],
        "numpy": {
            "key": torch.from_numpy(numpy_state["state"]["key"].astype(np.int64)),
            "pos": int(numpy_state["state"]["pos"]),
            "has_gauss": int(numpy_state["has_gauss"]),
            "gauss": float(numpy_state["gauss"]),
        },
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore_rng_states(states: dict[str, Any]) -> None:
    """Put the random states of this process back.

    Args:
        states: what `rng_states` returned, as saved or as loaded from a checkpoint.
    """
    torch.set_rng_state(states["torch"].cpu())
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words), gauss))
    numpy_state = states["numpy"]
    np.random.set_state(
        (
            "MT19937",
            numpy_state["key"].cpu().numpy().astype(np.uint32),
            numpy_state["pos"],
            numpy_state["has_gauss"],
            numpy_state["gauss"],
        )
    )
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"].cpu())
