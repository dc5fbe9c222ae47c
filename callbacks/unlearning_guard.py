"""UnlearningGuard: stop unlearning before it has taken more from the model than the rows to forget"""

from __future__ import annotations

from statistics import fmean
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lit_reason.core.probe import need_scores
from lit_reason.errors import UserError


class UnlearningGuard(Callback):
    """Stops after a validation that finds too little utility, or rows forgotten far enough.

    The challenge asks for an MMLU of at least 75 % of what it was. Utility is what `data.utility` measures, against its
    value before the first step.

    Args:
        min_utility: share of the utility at the start below which training stops.
        max_forget_loss: mean loss of a row to forget, in nats a token, above which training stops; null for none.

    Attributes:
        start: utility before the first step.
        reason: why training was stopped; empty while it was not.
    """

    def __init__(self, min_utility: float = 0.75, max_forget_loss: float | None = None) -> None:
        if not 0 < min_utility <= 1:
            raise UserError(f"UnlearningGuard.min_utility is {min_utility}; it is a share above 0, at most 1")
        self.min_utility, self.max_forget_loss = min_utility, max_forget_loss
        self.start: float | None = None
        self.reason = ""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the start, unless a resumed run has done so; warn where it is no better than guessing.

        Raises:
            UserError: there is nothing to measure utility on, or no validation that could find anything.
        """
        need_scores(pl_module, "UnlearningGuard")
        if not trainer.enable_validation:
            raise UserError("UnlearningGuard looks after each validation, and this run has none (limit_val_batches)")
        if self.start is None:
            module: Any = pl_module
            self.start = module.rescore()[0].utility
        if self.start is None:
            raise UserError("UnlearningGuard watches utility: give data.utility, `common` or a file of questions")
        right = [is_right for _, is_right in trainer.datamodule.choices.values()]  # type: ignore[attr-defined]
        if self.start <= (chance := fmean(right)):
            rank_zero_warn(
                f"UnlearningGuard: utility is {self.start:.3f} before the first step, no better than guessing "
                f"({chance:.3f}), so it cannot show a loss. Give data.utility questions that this model can answer"
            )

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare, and stop all processes alike: figures are equal on all of them."""
        if trainer.sanity_checking or self.start is None or trainer.state.fn != "fit":
            return
        utility = float(trainer.callback_metrics["val/utility"])
        forget = float(trainer.callback_metrics["val/forget_loss"])
        if utility < self.min_utility * self.start:
            self.reason = f"utility fell from {self.start:.3f} to {utility:.3f}, below {self.min_utility:.0%} of it"
        elif self.max_forget_loss is not None and forget > self.max_forget_loss:
            self.reason = (
                f"the loss of the rows to forget is {forget:.2f}, above max_forget_loss {self.max_forget_loss}"
            )
        if self.reason:
            trainer.should_stop = True
            rank_zero_info(f"UnlearningGuard stops after step {trainer.global_step}: {self.reason}")

    def state_dict(self) -> dict[str, Any]:
        """Utility at the start."""
        return {"start": self.start}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on comparing with the start of the run that wrote the checkpoint."""
        self.start = state_dict["start"]
