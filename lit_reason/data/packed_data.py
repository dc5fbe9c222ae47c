"""What the data modules of packed rows share: their files, and loaders that put rows into micro-batches."""

from __future__ import annotations

import shutil
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Literal, cast

import torch
from lightning.pytorch import LightningDataModule

from lit_reason.core.run_folder import run_folder
from lit_reason.data.loader import BinSampler, PackLoader
from lit_reason.data.packing import Pack
from lit_reason.errors import UserError

Split = Literal["train", "val", "test"]


class PackedData(LightningDataModule, ABC):
    """A data module whose rows lie in stores on disk, one a split, which `setup` opens.

    Attributes:
        files: what the recipe names for each split.
        holdout: above 0, the validation rows come out of the training files where `files` names none.
        tokenizer: set by `setup`, or from outside where there is no trainer.
        stores: rows by number, with `lengths`, `weight_sums` and `meta`, by split.
        batch_tokens: tokens in a micro-batch.
        batch_rows: rows in a micro-batch instead; None counts tokens.
        seed: of the order of rows.
        workers: loading processes.
    """

    files: dict[str, str | list[str] | None]
    holdout: float
    tokenizer: Any
    stores: dict[str, Any]
    batch_tokens: int
    batch_rows: int | None
    seed: int
    workers: int

    @abstractmethod
    def open_store(self, split: Split) -> Any:
        """Tokenise the rows of a split, or open them from the cache.

        Args:
            split: name of a split.
        """

    def setup(self, stage: str) -> None:
        """Open the stores that a stage needs and that are not open yet.

        Args:
            stage: `fit`, `validate`, `test` or `predict`, which needs none.

        Raises:
            UserError: the recipe names no file for them, or its rows cannot be used.
        """
        for split, needed in (("train", "fit"), ("test", "test")):
            if stage == needed and not self.files[split]:
                key = f"data.{split}_file"
                raise UserError(f"{key} is missing: give the file to {split} on, --{key} FILE")
        if stage == "validate" and not self.has_val:
            raise UserError("nothing to validate on: give data.val_file, or data.holdout with data.train_file")
        self.find_tokenizer()
        wanted: dict[str, tuple[Split, ...]] = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}
        for split in wanted.get(stage, ()):
            if split not in self.stores and (split != "val" or self.has_val):
                self.stores[split] = self.open_store(split)

    def find_tokenizer(self) -> None:
        """Take the tokenizer of the model that is trained, where none is set."""
        if self.tokenizer is None:
            assert self.trainer is not None, "set .tokenizer to use the data module without a trainer"
            self.tokenizer = cast(Any, self.trainer.lightning_module).tokenizer

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
