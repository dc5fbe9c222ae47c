"""HFExport: the trained model as a plain Hugging Face folder when training ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lit_reason.core.run_folder import run_folder
from lit_reason.errors import UserError
from lit_reason.strategies.sharding import gather


class HFExport(Callback):
    """Writes weights, config, tokenizer and chat template to the run folder when training ends.

    Args:
        folder: name of the folder inside the run folder.
        merge: fold a low-rank adapter into its base, so that the folder loads without peft; otherwise the
            adapter alone is written.
        which: `last` exports the weights training ended with; `best` those of the best checkpoint of the
            first `ModelCheckpoint` that monitors a metric.
    """

    def __init__(self, folder: str = "export", merge: bool = True, which: Literal["last", "best"] = "last") -> None:
        if which not in ("last", "best"):
            raise UserError(f"HFExport.which is {which!r}; allowed: last, best")
        self.folder, self.merge, self.which = folder, merge, which

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find out before training, not after it, that the export cannot work.

        Raises:
            UserError: `which="best"` without a monitoring `ModelCheckpoint` or with sharded weights.
        """
        if self.which == "best" and monitoring_checkpoint(trainer) is None:
            raise UserError(
                'HFExport.which is "best", but no ModelCheckpoint of this run monitors a metric: '
                'give one `monitor` (for example "val/loss"), or set which to "last"'
            )
        if isinstance(trainer.strategy, FSDPStrategy):
            raise UserError("HFExport cannot gather what strategy fsdp shards: use `trainer.strategy: fsdp2`")
        if self.which == "best" and isinstance(trainer.strategy, ModelParallelStrategy):
            raise UserError('HFExport.which is "best", which sharded weights do not have; set it to "last"')

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Export; the last moment, when every checkpoint of the run is on disk."""
        target = run_folder(trainer) / self.folder  # asks all processes for the folder, so not on rank 0 alone
        regime: Any = pl_module
        if isinstance(trainer.strategy, ModelParallelStrategy):
            whole = gather(regime.lm)  # all processes together
            if whole is not None:
                self._export(whole, regime.tokenizer, target)
            return
        if not trainer.is_global_zero:
            return
        best = best_checkpoint(trainer) if self.which == "best" else None
        if self.which == "best" and best is None:
            rank_zero_warn("No checkpoint was ever scored in this run: HFExport writes the last weights instead.")
        if best is None:
            self._export(regime.lm, regime.tokenizer, target)
            return
        weights = checkpoint_weights(best)
        # Only what the checkpoint replaces: with an adapter, a large frozen base is left alone.
        kept = {name: v.detach().cpu().clone() for name, v in pl_module.state_dict().items() if name in weights}
        try:
            pl_module.load_state_dict(weights, strict=pl_module.strict_loading)
            self._export(regime.lm, regime.tokenizer, target)
        finally:
            pl_module.load_state_dict(kept, strict=pl_module.strict_loading)

    def _export(self, lm: Any, tokenizer: Any, target: Path) -> None:
        from lit_reason.models.export import export_model

        export_model(lm, tokenizer, target, merge=self.merge)
        rank_zero_info(f"Exported the model to {target}")


def monitoring_checkpoint(trainer: Trainer) -> ModelCheckpoint | None:
    """The first `ModelCheckpoint` of the run that monitors a metric."""
    found = (c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and c.monitor is not None)
    return next(found, None)


def best_checkpoint(trainer: Trainer) -> Path | None:
    """The checkpoint with the best monitored value so far; None before the first one was scored."""
    callback = monitoring_checkpoint(trainer)
    return Path(callback.best_model_path) if callback and callback.best_model_path else None


def checkpoint_weights(path: Path) -> dict[str, Any]:
    """The module weights inside a checkpoint file, on the CPU.

    Args:
        path: a Lightning checkpoint; loaded with `weights_only=True`, so nothing in it can run code.

    Raises:
        UserError: the file is missing, or is not a checkpoint.
    """
    if not path.is_file():
        raise UserError(f"best checkpoint {path} is not there any more: it was moved or deleted during the run")
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    if "state_dict" not in checkpoint:
        raise UserError(f"{path} holds no `state_dict`: it is not a Lightning checkpoint")
    return checkpoint["state_dict"]
