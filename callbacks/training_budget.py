"""TrainingBudget: train for a number of trained tokens, or for a share of what the recipe says."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from lit_reason.data.loader import PackLoader
from lit_reason.errors import UserError


class TrainingBudget(Callback):
    """Sets the length of a run before its schedule is made, so that warm-up and decay fit it.

    A run ends with an optimizer step. A number of tokens is therefore met to within half a step: of the two steps
    around it the nearer one is the last. How many trained tokens each step takes is known beforehand, from the plan
    of the epochs; the run passes over the rows as often as it must.

    It changes the length and nothing else, for any data module of packs. A corpus that is larger than the budget is
    better cut short by `TextData.token_budget`, which tokenises no more of it than that.

    Args:
        trained_tokens: tokens that carry loss, over all processes; unset: the recipe's own `max_epochs` or
            `max_steps`.
        share: take only this share of either; in (0, 1].
    """

    def __init__(self, trained_tokens: int | None = None, share: float = 1.0) -> None:
        if trained_tokens is not None and trained_tokens < 1:
            raise UserError(f"TrainingBudget.trained_tokens is {trained_tokens}; it must be at least 1")
        if not 0 < share <= 1:
            raise UserError(f"TrainingBudget.share is {share}; it must lie above 0 and be at most 1")
        self.trained_tokens, self.share = trained_tokens, share

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Set `max_steps`. Lightning calls this before the optimizer and its schedule are built.

        Raises:
            UserError: the data module does not give packs, or the recipe sets no length of which to take a share.
        """
        if stage != "fit" or (self.trained_tokens is None and self.share == 1):
            return
        if self.trained_tokens is None:
            whole = trainer.estimated_stepping_batches
            if whole == float("inf"):
                raise UserError("TrainingBudget.share: set trainer.max_epochs or trainer.max_steps")
            steps = max(1, round(self.share * whole))
        else:
            data: Any = getattr(trainer, "datamodule", None)
            loader = data.train_dataloader() if data is not None else None
            if not isinstance(loader, PackLoader):
                raise UserError("TrainingBudget.trained_tokens needs a data module of packs, such as TraceData")
            steps = loader.steps_for(self.share * self.trained_tokens)
        rank_zero_info(f"Training for {steps:,} optimizer steps")
        # Lightning reads its length from these two fields; max_epochs -1 leaves it to the steps alone.
        trainer.fit_loop.epoch_loop.max_steps = steps
        trainer.fit_loop.max_epochs = -1
