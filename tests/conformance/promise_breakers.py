"""Regimes that each break one promise, to show that its check can fail."""

from __future__ import annotations

from typing import Any

import torch

from lit_reason.data.packing import Pack
from lit_reason.errors import UserError
from lit_reason.regimes.sft.regime import SFTRegime
from lit_reason.regimes.steering.regime import SteeringRegime


class ClimbingRegime(SFTRegime):
    """Trains away from the data."""

    def training_step(self, batch: Pack, batch_idx: int) -> torch.Tensor:
        return -0.1 * super().training_step(batch, batch_idx)


class MeanOfMeansRegime(SFTRegime):
    """Divides by the tokens of the micro-batch, not of the step."""

    def training_step(self, batch: Pack, batch_idx: int) -> torch.Tensor:
        super().training_step(batch, batch_idx)
        return self.score(batch).loss_sum / batch.index.numel()


class PerRankRegime(SFTRegime):
    """Forgets that gradients are averaged over processes."""

    def normalise(self, loss_sum: torch.Tensor, pack: Pack) -> torch.Tensor:
        return super().normalise(loss_sum, pack) / (1 + 4 * self.trainer.global_rank)


class UnseededRegime(SFTRegime):
    """Jolts the output layer by noise from a source of its own."""

    def training_step(self, batch: Pack, batch_idx: int) -> torch.Tensor:
        weight = self.lm.head.layer.weight
        with torch.no_grad():
            weight.add_(0.01 * torch.randn(weight.shape, generator=self.source))
        return super().training_step(batch, batch_idx)

    def on_fit_start(self) -> None:
        self.source = torch.Generator()
        self.source.seed()


class ForgetfulRegime(SFTRegime):
    """Keeps a counter that no checkpoint holds."""

    steps = 0

    def training_step(self, batch: Pack, batch_idx: int) -> torch.Tensor:
        self.steps += 1
        return super().training_step(batch, batch_idx) / self.steps


class HalfRegime(SFTRegime):
    """Trains the upper layers alone."""

    def training_step(self, batch: Pack, batch_idx: int) -> torch.Tensor:
        hidden = self.lm.hidden(batch.ids, batch.positions, batch.cu_seqlens).detach()
        out = self.lm.head(hidden[batch.index], batch.targets, batch.target_weight)
        self.record(self.train_meter, out, batch)
        return self.normalise(out.loss_sum, batch)


class SecretiveRegime(SFTRegime):
    """Has an argument that the docstring leaves out.

    Args:
        lm: the model.
        optim: optimizer and schedule.
        sampling: how `predict` samples.
    """

    def __init__(self, *args, strength: float = 1.0, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.strength = strength


class DeafRegime(SFTRegime):
    """Trains the whole model whether or not it is given an adapter."""

    def configure_model(self) -> None:
        super().configure_model()
        self.lm.requires_grad_(True)


class MuteRegime(SFTRegime):
    """Refuses adapters without saying so."""

    def configure_model(self) -> None:
        if self.lm_config.adapter:
            raise UserError("this cannot be done")
        super().configure_model()


class DriftingRegime(SteeringRegime):
    """Says that it only collects, and moves a weight."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        with torch.no_grad():
            self.lm.head.layer.weight.mul_(1.001)
        return super().training_step(batch, batch_idx)


class AmnesicRegime(SteeringRegime):
    """Keeps what it has collected out of its checkpoints."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["collection"]["banks"] = []
