"""VerifiedGeneration: real accuracy on held-out problems while training goes on."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn

from lit_reason.core.evaluation import EvalPrompt, EvalResult, Part, evaluate
from lit_reason.errors import UserError
from lit_reason.rewards.checkers import get_checker
from lit_reason.rollout.config import SamplingConfig

Listener = Callable[[Trainer, int, EvalResult], None]


class VerifiedGeneration(Callback):
    """Samples answers to held-out problems, checks them, and logs accuracy with its interval.

    Logs `val/pass@k`, `val/pass@k_low`, `val/pass@k_high`, `val/closed`, `val/ended`, `val/traced`,
    `val/generated_tokens`, `val/repetition` and `val/checker_errors` (`core.evaluation.EvalResult.metrics`).
    `ModelCheckpoint(monitor="val/pass@1", mode="max")` and `EarlyStopping` can follow any of them: with
    `every_n_steps` unset the numbers are there when these two look, at the end of each validation. With it
    set, between two evaluations they see the newest numbers there are; give `ModelCheckpoint` the same
    interval as `every_n_train_steps`.

    Needs `datamodule.eval_prompts(limit)`, `datamodule.stop_ids`, `module.lm` and
    `module.tokenizer`. Every process takes part: under DDP each generates for its share of the problems,
    under strategies that shard the model all generate for all of them in step.

    Args:
        every_n_steps: generate after every so many optimizer steps; unset: at the end of each validation.
        at_start: generate before the first step, too.
        at_end: generate when training ends, unless that was just done.
        limit: number of problems.
        checker: `numeric`, `boxed`, `exact`, `choice`, or `package.module:function`.
        sampling: how to sample.
        k: which pass@k to log; `sampling.samples` must be at least the largest.
        part: what the checker reads: the `solution` after the thoughts, or `all` of the completion.

    Attributes:
        last: the newest result, None before the first.
        history: one entry an evaluation: `step`, `epoch`, `seconds`, `cpu_seconds`, `prompts` and the logged numbers.
            Kept in checkpoints.
        listeners: called with (trainer, step, result) after each evaluation, on every process.
    """

    def __init__(
        self,
        every_n_steps: int | None = None,
        at_start: bool = False,
        at_end: bool = True,
        limit: int = 100,
        checker: str = "numeric",
        sampling: SamplingConfig = SamplingConfig(),  # noqa: B008 (frozen)
        k: list[int] | None = None,
        part: Part = "solution",
    ) -> None:
        for name, value in (("every_n_steps", every_n_steps), ("limit", limit)):
            if value is not None and value < 1:
                raise UserError(f"VerifiedGeneration.{name} is {value}; it must be at least 1")
        if part not in ("solution", "all"):
            raise UserError(f"VerifiedGeneration.part is '{part}'; it must be solution or all")
        self.every_n_steps, self.at_start, self.at_end, self.limit = every_n_steps, at_start, at_end, limit
        self.checker, self.sampling, self.k, self.part = get_checker(checker), sampling, k or [1], part
        self.last: EvalResult | None = None
        self.history: list[dict[str, Any]] = []
        self.listeners: list[Listener] = []
        self._last_step: int | None = None
        self._prompts: list[EvalPrompt] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find out before training that there is nothing to generate for.

        Raises:
            UserError: the run has no data module that gives prompts.
        """
        self._prompts = None  # another call of fit or validate may bring other data
        if stage in ("fit", "validate") and not hasattr(getattr(trainer, "datamodule", None), "eval_prompts"):
            raise UserError(
                "VerifiedGeneration needs a data module with eval_prompts(limit), such as TraceData; "
                "this run has none. Give one, or leave the callback out"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate the untrained model, when asked to; not again after a resume."""
        if self.at_start and trainer.global_step == 0:
            self._publish(trainer, self._evaluate(trainer, pl_module))

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Evaluate every `every_n_steps` optimizer steps."""
        step = trainer.global_step
        if self.every_n_steps and step and step % self.every_n_steps == 0 and step != self._last_step:
            metrics = self._evaluate(trainer, pl_module)
            self._publish(trainer, metrics)
            # Only what is logged through the module reaches the progress bar and stays among the step's
            # metrics.
            pl_module.log_dict(self._shown(metrics), prog_bar=True, logger=False, on_step=True, batch_size=1)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate at the end of a validation: of each one in training without `every_n_steps`, and of
        `validate`."""
        if trainer.sanity_checking or (self.every_n_steps and trainer.state.fn == TrainerFn.FITTING):
            return
        metrics = self._evaluate(trainer, pl_module)
        shown = self._shown(metrics)
        hidden = {name: value for name, value in metrics.items() if name not in shown}
        # The numbers are equal on all processes already; sync_dist only keeps Lightning from warning about
        # it.
        pl_module.log_dict(shown, prog_bar=True, batch_size=1, sync_dist=trainer.world_size > 1)
        pl_module.log_dict(hidden, batch_size=1, sync_dist=trainer.world_size > 1)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate the final model, when asked to and not just done."""
        if self.at_end and self._last_step != trainer.global_step:
            self._publish(trainer, self._evaluate(trainer, pl_module))
        if not self.history:
            rank_zero_warn(
                "VerifiedGeneration never generated in this run: there was no validation, every_n_steps is "
                f"{self.every_n_steps or 'not set'} and at_end is off"
            )

    def state_dict(self) -> dict[str, Any]:
        """The history, and the step of its last entry."""
        return {"history": self.history, "last_step": self._last_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the history of the run that wrote the checkpoint."""
        self.history, self._last_step = list(state_dict["history"]), state_dict["last_step"]

    def _evaluate(self, trainer: Any, pl_module: Any) -> dict[str, float]:
        """One evaluation, entered in the history; the numbers to log."""
        start, cpu_start = time.perf_counter(), time.process_time()
        data = trainer.datamodule
        if self._prompts is None:
            self._prompts = data.eval_prompts(self.limit)
        with trainer.precision_plugin.forward_context():  # the same arithmetic as in training, autocast included
            self.last = evaluate(
                pl_module.lm,
                pl_module.tokenizer,
                self._prompts,
                self.sampling,
                self.checker,
                self.k,
                stop_ids=data.stop_ids,
                progress=trainer.is_global_zero,
                part=self.part,
                ranks="split" if holds_whole_model(trainer) else "same",
            )
        metrics = self.last.metrics("val/")
        self._last_step = trainer.global_step
        self.history.append(
            {
                "step": trainer.global_step,
                "epoch": trainer.current_epoch,
                "seconds": time.perf_counter() - start,
                "cpu_seconds": time.process_time() - cpu_start,
                "prompts": self.last.prompts,
                **metrics,
            }
        )
        for listener in self.listeners:
            listener(trainer, trainer.global_step, self.last)
        return metrics

    def _shown(self, metrics: dict[str, float]) -> dict[str, float]:
        """The part that is worth a place in the progress bar."""
        return {name: metrics[name] for name in (f"val/pass@{k}" for k in self.k)}

    @staticmethod
    def _publish(trainer: Trainer, metrics: dict[str, float]) -> None:
        """Log in a hook in which Lightning's own `log` is not allowed, or would wait for the next log
        step."""
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step)
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in metrics.items()})


def holds_whole_model(trainer: Trainer) -> bool:
    """Whether every process of the run has all of the weights, so that each may generate at its own pace."""
    return isinstance(trainer.strategy, DDPStrategy) and not isinstance(trainer.strategy, DeepSpeedStrategy)
