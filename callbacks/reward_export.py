"""RewardExport: the learned reward as a plain Hugging Face folder when training ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_info

from lit_reason.core.run_folder import run_folder
from lit_reason.data.rendering.stop_tokens import choose_pad_id
from lit_reason.errors import UserError
from lit_reason.strategies.sharding import gather


class RewardExport(Callback):
    """Writes a sequence-classification folder of one label, which plain transformers loads and scores with.

    For any regime with a `reward` (`models.reward.RewardModel`).

    Args:
        folder: name of the folder inside the run folder.
    """

    def __init__(self, folder: str = "reward") -> None:
        self.folder = folder

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find out before training that there will be nothing to export.

        Raises:
            UserError: the regime trains no reward model.
        """
        if not hasattr(pl_module, "reward"):
            raise UserError(
                f"RewardExport: {type(pl_module).__name__} trains no reward model with these settings; leave it out"
            )

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Export."""
        from lit_reason.models.export import export_reward
        from lit_reason.models.reward import RewardModel, let_go

        regime: Any = pl_module
        target: Path = run_folder(trainer) / self.folder  # asks all processes for the folder
        reward = regime.reward
        if isinstance(trainer.strategy, ModelParallelStrategy):
            let_go(reward)
            let_go(reward.lm)
            weight = reward.score.weight.full_tensor().detach().cpu()
            whole = gather(reward.lm)
            if whole is None:
                return
            copy = RewardModel(whole, shared=reward.trunk is None)
            copy.mean, copy.std = reward.mean, reward.std
            with torch.no_grad():
                copy.score.weight.copy_(weight)
            reward = copy
        if trainer.is_global_zero:
            pad_id = choose_pad_id(regime.tokenizer, trainer.datamodule.stop_ids)  # type: ignore[attr-defined]
            export_reward(reward, regime.tokenizer, target, pad_id=pad_id)
            rank_zero_info(f"Exported the reward model to {target}")
