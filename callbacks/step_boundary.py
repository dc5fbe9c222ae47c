"""StepBoundary: every checkpoint describes the end of an optimizer step, whenever it is written."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities import rank_zero_warn

from lit_reason.callbacks.rng_state import RngState, rng_states
from lit_reason.core.metrics_file import MetricsFile
from lit_reason.core.ranks import from_all_ranks
from lit_reason.core.run_folder import run_folder


@dataclass
class Moment:
    """All that changes between the end of one optimizer step and the end of the next, weights and optimizer apart.

    Attributes:
        loops: state of the training loop, with the loader's place in the data.
        random: random states of this process.
        meter: sums of the figures that were not logged yet, on this process.
        rows: rows of `metrics.csv`.
        batches: batches begun so far.
        validation_due: the loop is about to validate.
    """

    loops: dict[str, Any]
    random: dict[str, Any]
    meter: dict[str, torch.Tensor]
    rows: int
    batches: int
    validation_due: bool


class StepBoundary(Callback):
    """Makes checkpoints that continue bit for bit; `ReasonTrainer` adds it to every run.

    Lightning saves when it is told to: in the middle of accumulated micro-batches, of a validation, of a step that
    an error broke off. The gradients gathered so far are not in the file, so training could not go on as it was.
    Here such a checkpoint describes the end of the last whole step instead, whose weights are still those in
    memory. A validation that was due or under way is run again after the resume.

    With it go the figures not logged yet and the length of `metrics.csv`, so that the file of a killed and resumed
    run has every row once.
    """

    def __init__(self) -> None:
        self._moment: Moment | None = None
        self._in_step = False
        self._failed = False
        self._loaded: dict[str, Any] | None = None
        self._steps = 0  # the number that loggers give to the next step
        self._resumed_at: int | None = None

    # ---- the end of a step ---------------------------------------------------------------------------------

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """From here to the end of the batch, weights may be half updated."""
        self._in_step = True

    def on_train_batch_start(self, trainer: Any, pl_module: LightningModule, *_: Any) -> None:
        """Number the first step after a resume; Lightning is one ahead after a checkpoint of an epoch's end."""
        if self._resumed_at is not None:
            trainer.fit_loop.epoch_loop._batches_that_stepped = self._resumed_at
            self._resumed_at = None

    def on_train_batch_end(self, trainer: Any, pl_module: LightningModule, *_: Any) -> None:
        """Note the moment, once the step's figures are in `metrics.csv`."""
        if trainer.fit_loop._should_accumulate():
            return
        connector, loop = trainer._logger_connector, trainer.fit_loop.epoch_loop
        for logger in _files(trainer) if connector.should_update_logs else ():
            figures = {name: float(value) for name, value in connector.metrics["log"].items()}
            if figures:
                logger.log_early({"epoch": trainer.current_epoch, **figures}, loop._batches_that_stepped)
        self._in_step, self._steps = False, loop._batches_that_stepped + 1
        self._moment = self._now(trainer, pl_module, loop._should_check_val_fx(trainer.fit_loop._data_fetcher))

    def on_validation_end(self, trainer: Any, pl_module: LightningModule) -> None:
        """The validation after a step is a part of it: note the moment again."""
        if self._moment is not None and trainer.fit_loop.epoch_loop.batch_progress.total.ready == self._moment.batches:
            self._moment = self._now(trainer, pl_module, False)

    def _now(self, trainer: Any, pl_module: LightningModule, validation_due: bool) -> Moment:
        return Moment(
            trainer.fit_loop.state_dict(),
            rng_states(),
            _meter_state(pl_module),
            _rows(trainer),
            trainer.fit_loop.epoch_loop.batch_progress.total.ready,
            validation_due,
        )

    # ---- saving --------------------------------------------------------------------------------------------

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Before a checkpoint is saved because of it: see that it is, or that it is not.

        A SIGTERM always saves, where checkpoints are saved at all. Half updated weights are never saved.
        """
        self._failed = True
        savers = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
        if self._in_step:
            if any(saver.save_on_exception for saver in savers):
                rank_zero_warn("Stopped in the middle of a weight update: no checkpoint is saved; the last one stands.")
            for saver in savers:
                saver.save_on_exception = False
        elif type(exception).__name__ == "SIGTERMException" and savers:
            if not any(saver.save_on_exception for saver in savers):
                savers[0].save_on_exception = True

    def on_save_checkpoint(self, trainer: Any, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Describe the end of the last step, also when more has begun since."""
        if "loops" not in checkpoint or "optimizer_states" not in checkpoint:
            return  # weights alone
        begun = trainer.fit_loop.epoch_loop.batch_progress.total.ready
        broken_off = self._failed and trainer.state.stage in (RunningStage.VALIDATING, RunningStage.SANITY_CHECKING)
        moment = self._moment
        if moment is not None and (begun != moment.batches or broken_off):
            checkpoint["loops"] = {**checkpoint["loops"], "fit_loop": copy.deepcopy(moment.loops)}
            for callback in trainer.callbacks:
                if isinstance(callback, RngState):
                    checkpoint["callbacks"][callback.state_key] = {"ranks": from_all_ranks(moment.random)}
        else:
            inside = _inside_batch_end(checkpoint["loops"]["fit_loop"])
            moment = self._now(trainer, pl_module, inside and moment is not None and moment.validation_due)
        _set_validation(checkpoint["loops"]["fit_loop"], moment.validation_due)
        checkpoint["step_boundary"] = {
            "meters": from_all_ranks(moment.meter),
            "rows": moment.rows,
            "steps": self._steps,
            "validation_due": moment.validation_due,
            "folder": str(run_folder(trainer)),
        }

    # ---- resuming ------------------------------------------------------------------------------------------

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep what `on_save_checkpoint` added until training starts."""
        if "step_boundary" in checkpoint:
            self._loaded = {**checkpoint["step_boundary"], "loops": copy.deepcopy(checkpoint["loops"]["fit_loop"])}

    def on_train_start(self, trainer: Any, pl_module: LightningModule) -> None:
        """Take up the figures and the file where the checkpoint was. Not called when nothing is left to train."""
        self._failed = self._in_step = False
        self._moment = None
        loop = trainer.fit_loop
        if loop._combined_loader_states_to_load:
            # Lightning does not give the loader its state back after a finished epoch, nor when it made the loader
            # before it read the checkpoint, to count the steps of `max_epochs` epochs
            # (Lightning-AI/pytorch-lightning#20550).
            loop._combined_loader._load_state_dicts(loop._combined_loader_states_to_load)
            loop._combined_loader_states_to_load = []
            iter(loop._data_fetcher)
        loaded, self._loaded = self._loaded, None
        self._steps = loop.epoch_loop._batches_that_stepped
        if loaded is None:
            return
        self._steps = self._resumed_at = loaded["steps"]
        if len(loaded["meters"]) == trainer.world_size:
            for name, value in loaded["meters"][trainer.global_rank].items():
                setattr(pl_module.train_meter, name, value.to(pl_module.device))
        for logger in _files(trainer) if trainer.is_global_zero else ():
            if logger._go_on:
                logger.experiment.keep(loaded["rows"])
        now = self._now(trainer, pl_module, loaded["validation_due"])
        self._moment = dataclasses.replace(now, loops=loaded["loops"])


def _files(trainer: Any) -> list[MetricsFile]:
    return [logger for logger in trainer.loggers if isinstance(logger, MetricsFile)]


def _rows(trainer: Any) -> int:
    files = _files(trainer) if trainer.is_global_zero else []
    for logger in files:
        logger.save()
    return files[0].rows if files else 0


def _meter_state(pl_module: Any) -> dict[str, torch.Tensor]:
    meter = getattr(pl_module, "train_meter", None)
    return {} if meter is None else {name: value.detach().clone() for name, value in meter.metric_state.items()}


def _inside_batch_end(fit_loop: dict[str, Any]) -> bool:
    total = fit_loop["epoch_loop.batch_progress"]["total"]
    return total["completed"] == total["processed"] - 1


def _set_validation(fit_loop: dict[str, Any], due: bool) -> None:
    """Write a loop state after which Lightning validates, from the first batch, or does not.

    On a resume Lightning skips a validation that came after the checkpoint, and repeats one that it takes for
    unfinished. It tells by these counters.
    """
    validation = fit_loop["epoch_loop.val_loop.batch_progress"]
    begun = {"ready": 1, "started": 1, "processed": 0, "completed": 0}
    for span in ("total", "current"):
        done = validation[span]["completed"]
        validation[span] = {**validation[span], **(begun if due else dict.fromkeys(begun, done))}
        if due:
            training = fit_loop["epoch_loop.batch_progress"][span]
            training["completed"] = training["processed"]
