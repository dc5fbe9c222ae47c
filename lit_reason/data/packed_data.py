"""What the data modules of packed rows share: their files, and loaders that put rows into micro-batches."""

from __future__ import annotations

import shutil
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule

from lit_reason.core.run_folder import run_folder
from lit_reason.data.loader import BinSampler, PackLoader
from lit_reason.data.packing import Pack

Split = Literal["train", "val", "test"]


class PackedData(LightningDataModule, ABC):
    """A data module whose rows lie in stores on disk, one a split, which `setup` opens.

    Attributes:
        files: what the recipe names for each split.
        holdout: above 0, the validation rows come out of the training files where `files` names none.
        stores: rows by number, with `lengths`, `weight_sums` and `meta`, by split.
        batch_tokens: tokens in a micro-batch.
        batch_rows: rows in a micro-batch instead; None counts tokens.
        seed: of the order of rows.
        workers: loading processes.
    """

    files: dict[str, str | list[str] | None]
    holdout: float
    stores: Mapping[str, Any]
    batch_tokens: int
    batch_rows: int | None
    seed: int
    workers: int

    @abstractmethod
    def setup(self, stage: str) -> None:
        """Open the stores that a stage needs.

        Args:
            stage: `fit`, `validate`, `test` or `predict`.
        """

    @property
    def has_val(self) -> bool:
        """Whether there are validation rows."""
        return bool(self.files["val"]) or (self.holdout > 0 and bool(self.files["train"]))

    @property
    def ledger(self) -> dict[str, Any]:
        """What preparation did to the training rows (for the run report); empty before `fit`."""
        return self.stores["train"].meta if "train" in self.stores else {}

    def paths(self, split: str) -> list[str]:
        """The files that the rows of a split come from.

        Args:
            split: name of a split.
        """
        given = self.files["train"] if split == "val" and not self.files["val"] else self.files[split]
        return [] if not given else [given] if isinstance(given, str) else list(given)

    def keep_quarantine(self, split: str, quarantine: Path) -> None:
        """Copy the list of unusable rows into the run folder. All processes call this together.

        Args:
            split: name of a split.
            quarantine: the list.
        """
        assert self.trainer is not None
        folder = run_folder(self.trainer)
        if self.trainer.is_global_zero and quarantine.exists():
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(quarantine, folder / f"quarantine-{split}.jsonl")

    # ---- loaders ----

    def loader(self, split: Split, *, shuffle: bool) -> PackLoader:
        """This process's packs of a split.

        Args:
            split: name of an open split.
            shuffle: a new order in each pass, else always the same one.
        """
        store = self.stores[split]
        ranks = (self.trainer.distributed_sampler_kwargs if self.trainer else None) or {}
        sampler = BinSampler(
            store.lengths,
            store.weight_sums,
            batch_tokens=None if self.batch_rows else self.batch_tokens,
            batch_rows=self.batch_rows or 1,
            shuffle=shuffle,
            seed=self.seed,
            accumulate=self.trainer.accumulate_grad_batches if shuffle and self.trainer else 1,
            rank=ranks.get("rank", 0),
            world=ranks.get("num_replicas", 1),
        )
        return PackLoader(store, sampler, self.workers)

    def train_dataloader(self) -> PackLoader:
        """Packs of training rows, in a new order each pass."""
        return self.loader("train", shuffle=True)

    def val_dataloader(self) -> PackLoader | list:
        """Packs of validation rows, always in the same order; empty without validation rows."""
        return self.loader("val", shuffle=False) if "val" in self.stores else []

    def test_dataloader(self) -> PackLoader:
        """Packs of test rows, always in the same order."""
        return self.loader("test", shuffle=False)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Packs move; anything else stays as it is."""
        return batch.to(device, non_blocking=True) if isinstance(batch, Pack) else batch
