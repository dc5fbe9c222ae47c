"""Steering: directions from a file are added while any regime validates, tests, predicts or trains."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer

from lit_reason.data.packing import Pack
from lit_reason.errors import UserError
from lit_reason.steering.config import SteerConfig
from lit_reason.steering.direction_file import read_directions
from lit_reason.steering.hook import SteeringHook

Stage = Literal["train", "validate", "test", "predict"]
STAGES = ("train", "validate", "test", "predict")


class Steering(Callback):
    """Plugs a file of directions into a run.

    The model itself is not changed: outside the chosen stages it computes what it always did. It fails at the start of
    the run when the directions belong to another model, and at a stage's end when they were never added.

    Args:
        file: directions, as the steering regime saves them.
        steer: which of them, how much and where.
        stages: when; `train` steers the training steps, the others the stage of that name.
    """

    def __init__(
        self,
        file: str,
        steer: SteerConfig,
        stages: Sequence[Stage] = ("validate", "test", "predict"),
    ) -> None:
        wrong = [stage for stage in stages if stage not in STAGES]
        if wrong or not stages:
            raise UserError(f"Steering.stages is {list(stages)}; allowed are {', '.join(STAGES)}, one at least")
        self.directions, self.config, self.stages = read_directions(file), steer, tuple(stages)
        for name in steer.mix:
            self.directions.get(name)
        if not steer.mix:
            raise UserError(
                f"Steering.steer.mix is empty: name directions and weights; {file} has "
                f"{', '.join(self.directions.vectors)}"
            )
        self.hook: SteeringHook | None = None

    def _fitting(self, pl_module: Any) -> SteeringHook:
        if self.hook is None:
            self.hook = SteeringHook(pl_module.lm.base, self.directions, self.config)
        return self.hook

    def _begin(self, stage: Stage, pl_module: LightningModule) -> None:
        if stage in self.stages:
            self._fitting(pl_module).passes = 0
            self._fitting(pl_module).attach()

    def _batch(self, stage: Stage, batch: Any) -> None:
        if stage in self.stages and self.hook is not None:
            # A scored answer stands for a generated one: its tokens are those that carry loss.
            self.hook.generated_BT = (batch.weight > 0)[None] if isinstance(batch, Pack) else None

    def _end(self, stage: Stage) -> None:
        if stage in self.stages and self.hook is not None:
            self.hook.detach()
            if not self.hook.passes:
                raise RuntimeError(f"steering: the layer never ran during {stage}, so nothing was steered")

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Make a hook anew for a model that a later run may have built anew."""
        self.hook = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare directions and model before training changes the model."""
        self._fitting(pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Steer a training step."""
        self._begin("train", pl_module)
        self._batch("train", batch)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop before validation begins."""
        self._end("train")

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Steer validation, and what other callbacks generate in it."""
        self._begin("validate", pl_module)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Tell prompt from answer in a batch of scored rows."""
        self._batch("validate", batch)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop."""
        self._end("validate")

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Steer the test."""
        self._begin("test", pl_module)

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Tell prompt from answer in a batch of scored rows."""
        self._batch("test", batch)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop."""
        self._end("test")

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Steer the answers."""
        self._begin("predict", pl_module)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop."""
        self._end("predict")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave nothing on the model when a run breaks off."""
        if self.hook is not None:
            self.hook.detach()
