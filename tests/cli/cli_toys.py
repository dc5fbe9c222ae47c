"""A tiny regime, datamodule and trainer that stand in for the real ones in tests of the command line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from torch.utils.data import DataLoader

from lit_reason.data.config import CondenseConfig
from lit_reason.errors import UserError
from lit_reason.models.config import ModelConfig


@dataclass(frozen=True)
class ToyOptim:
    """Optimizer of the toy.

    Args:
        lr: learning rate.
        schedule: shape of the rate.
    """

    lr: float = 1e-3
    schedule: Literal["cosine", "constant"] = "cosine"


class ToyRegime(LightningModule):
    """Base of the toy regimes.

    Args:
        lm: the model.
        optim: optimizer and schedule.
        width: inputs of the linear layer.
    """

    def __init__(
        self,
        lm: ModelConfig = ModelConfig(),  # noqa: B008
        optim: ToyOptim = ToyOptim(),  # noqa: B008
        width: int = 4,
    ) -> None:
        super().__init__()
        if width > 100:
            raise UserError(f"width is {width}; the toy allows at most 100")
        self.width, self.optim_config, self.lm_config = width, optim, lm
        self.layer = torch.nn.Linear(width, 1)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.layer(batch[:, : self.width]).square().mean()

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.log("val/loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.optim_config.lr)


class PlainToyRegime(ToyRegime):
    """The toy as it is."""


class LoudToyRegime(ToyRegime):
    """The toy with one number more.

    Args:
        volume: how loud.
        kwargs: see ToyRegime.
    """

    def __init__(self, volume: float = 1.0, **kwargs) -> None:
        super().__init__(**kwargs)
        self.volume = volume


class ToyData(LightningDataModule):
    """Random rows.

    Args:
        train_file: ignored, but required.
        condense: how traces are shortened.
        rows: number of rows.
    """

    def __init__(
        self,
        train_file: str,
        condense: CondenseConfig = CondenseConfig(),  # noqa: B008
        rows: int = 4,
    ) -> None:
        super().__init__()
        self.train_file, self.condense, self.rows = train_file, condense, rows

    def train_dataloader(self) -> DataLoader:
        return DataLoader(torch.ones(self.rows, 128), batch_size=2)

    val_dataloader = train_dataloader


class ToyBell(Callback):
    """Rings.

    Args:
        every: steps between two rings.
        sound: what it says.
    """

    def __init__(self, every: int = 1, sound: Literal["ding", "dong"] = "ding") -> None:
        self.every, self.sound = every, sound


class ToyTrainer(Trainer):
    """Lightning's trainer with `evaluate`."""

    def __init__(self, *args, use_distributed_sampler: bool = False, **kwargs) -> None:
        super().__init__(*args, use_distributed_sampler=use_distributed_sampler, **kwargs)

    def evaluate(self, model, datamodule=None, ckpt_path: str | None = None, limit: int = 4) -> int:
        """Count to the limit.

        Args:
            model: the regime.
            datamodule: the data.
            ckpt_path: checkpoint.
            limit: where to stop.
        """
        print(f"evaluated {limit} with width {model.width}")
        return limit
