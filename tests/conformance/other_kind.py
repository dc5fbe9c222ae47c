"""A regime of another kind: no packs, no traces, no labels. It samples from its model, is rewarded, and reinforces.

It shows that the promises ask nothing of data or loss beyond what `promises` says.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from lightning.pytorch import LightningDataModule

from lit_reason.core.regime import Regime
from lit_reason.errors import UserError


class Numbers:
    """Batches of row numbers in an order that depends on the epoch alone; its state is two integers."""

    def __init__(self, rows: int, batch_rows: int, rank: int, world: int) -> None:
        self.rows, self.batch_rows, self.rank, self.world = rows, batch_rows, rank, world
        self.epoch = self.position = 0

    def __len__(self) -> int:
        return self.rows // (self.batch_rows * self.world)

    def __iter__(self) -> Iterator[torch.Tensor]:
        order = torch.randperm(self.rows, generator=torch.Generator().manual_seed(self.epoch))
        while self.position < len(self):
            first = (self.position * self.world + self.rank) * self.batch_rows
            self.position += 1
            yield order[first : first + self.batch_rows]
        self.epoch, self.position = self.epoch + 1, 0

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.position = state["epoch"], state["position"]


class NumberedPrompts(LightningDataModule):
    """Prompts that stand for a number each.

    Args:
        rows: prompts an epoch.
        batch_rows: prompts in a batch.
    """

    def __init__(self, rows: int = 96, batch_rows: int = 8) -> None:
        super().__init__()
        self.rows, self.batch_rows = rows, batch_rows

    def train_dataloader(self) -> Numbers:
        ranks = self.trainer.distributed_sampler_kwargs or {}
        return Numbers(self.rows, self.batch_rows, ranks.get("rank", 0), ranks.get("num_replicas", 1))


class EvenRegime(Regime):
    """Makes tokens with an even id likelier, by policy gradient. Takes neither adapters nor micro-batches.

    Args:
        lm: the model.
        optim: optimizer and schedule.
        sampling: how `predict` samples.
    """

    learns = ("train/reward", "rises")

    def configure_model(self) -> None:
        if self.lm_config.adapter is not None:
            raise UserError("lm.adapter: this method trains whole weights")
        super().configure_model()

    def on_fit_start(self) -> None:
        if self.trainer.accumulate_grad_batches != 1:
            raise UserError("trainer.accumulate_grad_batches must be 1: a batch is sampled as one")

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        prompts = torch.stack([batch % 40, 7 * batch % 40], dim=1)
        logp = self.lm.hf(input_ids=prompts).logits[:, -1].log_softmax(-1)
        drawn = [
            torch.multinomial(row.exp(), 1, generator=torch.Generator().manual_seed(1000 * self.global_step + int(n)))
            for row, n in zip(logp.detach(), batch, strict=True)
        ]
        token = torch.cat(drawn)
        reward = (token % 2 == 0).float()
        loss = -((reward - 0.5) * logp.gather(-1, token[:, None])[:, 0]).mean()
        self.log_dict({"train/loss": loss.detach(), "train/reward": reward.mean()}, sync_dist=True)
        return loss
