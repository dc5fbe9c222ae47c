"""The trainer behind `lit-reason`: Lightning's, with the verbs and defaults of this project."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, cast

from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ProgressBar, RichProgressBar, TQDMProgressBar

from lit_reason.callbacks.rng_state import RngState
from lit_reason.callbacks.step_boundary import StepBoundary
from lit_reason.callbacks.stop_together import StopTogether
from lit_reason.callbacks.verified_generation import VerifiedGeneration
from lit_reason.core.checkpoint_io import WholeFileIO
from lit_reason.core.metrics_file import MetricsFile
from lit_reason.core.resume import go_on
from lit_reason.core.run_folder import run_folder
from lit_reason.data.reading.row_files import complete_or_absent
from lit_reason.errors import UserError
from lit_reason.rollout.config import SamplingConfig


class ReasonTrainer(Trainer):
    """Lightning's Trainer with one more verb, `evaluate`, and runs that survive being killed.

    Data loaders shard themselves (see `data.loader`). Checkpoints are whole files (`core.checkpoint_io`), describe
    the end of an optimizer step and hold all that a bit-equal resume needs (`callbacks.step_boundary`).

    Attributes:
        recipe: what the run was asked for, as plain values, to tell its earlier runs from those of other recipes;
            the command line sets it. None takes any earlier run for one of this recipe.
    """

    recipe: Mapping[str, Any] | None = None

    def __init__(self, *args: Any, use_distributed_sampler: bool = False, **kwargs: Any) -> None:
        callbacks = kwargs.get("callbacks")
        wanted = callbacks if isinstance(callbacks, list) else [callbacks]
        own_bar = any(isinstance(c, ProgressBar) for c in wanted)  # Lightning appends to this list
        super().__init__(*args, use_distributed_sampler=use_distributed_sampler, **kwargs)
        if type(self.strategy.checkpoint_io) is TorchCheckpointIO:
            self.strategy.checkpoint_io = WholeFileIO()
        self.loggers = [MetricsFile.like(logger) for logger in self.loggers]
        given: list[Any] = self.callbacks  # type: ignore[has-type]
        if not own_bar:
            # Lightning's own choice, where `rich` is installed, counts epochs to -2 when only max_steps is given.
            given = [TQDMProgressBar() if isinstance(c, RichProgressBar) else c for c in given]
        savers = [c for c in given if isinstance(c, Checkpoint)]
        own = [] if any(isinstance(c, RngState) for c in given) else [RngState()]
        others = [c for c in given if c not in savers]
        self.callbacks = [*others, *own, StopTogether(), StepBoundary(), *savers]  # what saves comes last

    def fit(
        self,
        model: LightningModule,
        train_dataloaders: Any = None,
        val_dataloaders: Any = None,
        datamodule: LightningDataModule | None = None,
        ckpt_path: Any = None,
        weights_only: bool | None = None,
        resume: str | None = None,
    ) -> None:
        """Train.

        Args:
            model: the regime.
            train_dataloaders: loaders in place of a data module.
            val_dataloaders: the same for validation.
            datamodule: gives the data.
            ckpt_path: start a new run from the state in this checkpoint.
            weights_only: load the checkpoint without running pickled code.
            resume: go on with an interrupted run, in its folder: `auto` takes the newest whole checkpoint of this
                recipe and starts afresh when there is none; or a checkpoint, or a run folder.

        Raises:
            UserError: the checkpoint to resume from is missing or broken.
        """
        if resume is not None:
            if ckpt_path is not None:
                raise UserError("resume and ckpt_path are both given: resume goes on with a run, ckpt_path starts one")
            ckpt_path = go_on(self, resume, self.recipe)
        super().fit(model, train_dataloaders, val_dataloaders, datamodule, ckpt_path, weights_only)

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

        With `data.pairs_file` a reward is evaluated instead: how often it prefers what was preferred.

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
        judging = getattr(datamodule, "pairs_file", None) is not None  # a reward is asked, not the policy
        self.callbacks = others if judging else [*others, asked]
        figures = self.validate(model, datamodule=datamodule, ckpt_path=ckpt_path, verbose=False)
        if self.is_global_zero and judging:
            width = max(len(name) for name in figures[0])
            print("\n".join(f"{name:<{width}}  {value:.3f}" for name, value in sorted(figures[0].items())))
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
        with complete_or_absent(folder / name) as unfinished, unfinished.open("w", encoding="utf-8") as file:
            for record in (r for batch in batches or [] for r in batch):
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
        if self.is_global_zero:
            print(f"predictions  {folder / name}")
        return batches
