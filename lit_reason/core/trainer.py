"""The trainer behind `lit-reason`: Lightning's, with the verbs and defaults of this project."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, cast

from lightning.pytorch import LightningDataModule, LightningModule, Trainer

from lit_reason.callbacks.verified_generation import VerifiedGeneration
from lit_reason.core.run_folder import run_folder
from lit_reason.rollout.config import SamplingConfig


class ReasonTrainer(Trainer):
    """Lightning's Trainer with one more verb, `evaluate`. Data loaders shard themselves (see `data.loader`)."""

    def __init__(self, *args: Any, use_distributed_sampler: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, use_distributed_sampler=use_distributed_sampler, **kwargs)

    def evaluate(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        ckpt_path: str | None = None,
        checker: str = "numeric",
        limit: int = 100,
        sampling: SamplingConfig | None = None,
        k: list[int] | None = None,
    ) -> list[Mapping[str, float]]:
        """Answer held-out problems by generation and check the answers.

        Args:
            model: the regime.
            datamodule: gives the held-out problems.
            ckpt_path: checkpoint to evaluate; default: the model as the recipe names it.
            checker: `numeric`, `boxed`, `exact`, `choice`, or `package.module:function`.
            limit: number of problems.
            sampling: sampling settings; default: those of the regime.
            k: pass@k to report; default: 1.

        Returns:
            The held-out figures, `val/pass@1` with its interval among them.
        """
        settings = sampling or cast(SamplingConfig, model.sampling)
        asked = VerifiedGeneration(checker=checker, limit=limit, sampling=settings, k=k or [1])
        others: list[Any] = [c for c in self.callbacks if not isinstance(c, VerifiedGeneration)]  # type: ignore[has-type]
        self.callbacks = [*others, asked]
        figures = self.validate(model, datamodule=datamodule, ckpt_path=ckpt_path, verbose=False)
        if self.is_global_zero and asked.last is not None:
            print(asked.last.table())
        return figures

    def predict(
        self,
        model: LightningModule | None = None,
        dataloaders: Any = None,
        datamodule: LightningDataModule | None = None,
        return_predictions: bool | None = None,
        ckpt_path: Any = None,
        weights_only: bool | None = None,
    ) -> Any:
        """Answer prompts, and write every completion to `predictions.jsonl` in the run folder.

        Args:
            model: the regime.
            dataloaders: lists of prompts, in place of a data module.
            datamodule: gives the prompts.
            return_predictions: as Lightning has it.
            ckpt_path: checkpoint to answer with; default: the model as the recipe names it.
            weights_only: load the checkpoint without running pickled code.

        Returns:
            The records, a list for each batch.
        """
        batches = super().predict(model, dataloaders, datamodule, return_predictions, ckpt_path, weights_only)
        folder = run_folder(self)
        folder.mkdir(parents=True, exist_ok=True)
        name = "predictions.jsonl" if self.world_size == 1 else f"predictions-{self.global_rank}.jsonl"
        with (folder / name).open("w", encoding="utf-8") as file:
            for record in (r for batch in batches or [] for r in batch):
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
        return batches
