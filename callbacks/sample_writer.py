"""SampleWriter: what the model wrote, for people to read."""

from __future__ import annotations

import json

from lightning.pytorch import Callback, LightningModule, Trainer

from lit_reason.callbacks.verified_generation import VerifiedGeneration
from lit_reason.core.evaluation import EvalResult
from lit_reason.core.run_folder import run_folder
from lit_reason.data.reading.row_files import complete_or_absent
from lit_reason.errors import UserError


class SampleWriter(Callback):
    """Writes completions of each verified generation to `samples-<step>.jsonl` in the run folder.

    One line a completion: `row_id`, `sample`, `prompt`, `completion`, `answer`, `correct`, `reason`, `error`,
    `tokens`, `ended`, `trace`, `repeats` (see `core.evaluation.EvalRecord`). It generates nothing itself and
    needs a `VerifiedGeneration` beside it. The same problems are written each time, so that two files show
    what training changed.

    Args:
        limit: number of problems, from the front; all samples of each are written.
    """

    def __init__(self, limit: int = 16) -> None:
        if limit < 1:
            raise UserError(f"SampleWriter.limit is {limit}; it must be at least 1")
        self.limit = limit

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Ask every `VerifiedGeneration` of the run for its results.

        Raises:
            UserError: there is none.
        """
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        sources = [c for c in callbacks if isinstance(c, VerifiedGeneration)]
        if not sources and stage in ("fit", "validate"):
            raise UserError(
                "SampleWriter writes what VerifiedGeneration generates, and this run has none: "
                "add VerifiedGeneration to trainer.callbacks"
            )
        for source in sources:
            if self.write not in source.listeners:
                source.listeners.append(self.write)

    def write(self, trainer: Trainer, step: int, result: EvalResult) -> None:
        """Write one file, whole or not at all; an earlier file of the same step is replaced.

        Args:
            trainer: of this run; gives the folder.
            step: optimizer steps done so far.
            result: the evaluation.
        """
        folder = run_folder(trainer)  # asks all processes, so not on the first alone
        if not trainer.is_global_zero:
            return
        folder.mkdir(parents=True, exist_ok=True)
        with (
            complete_or_absent(folder / f"samples-{step}.jsonl") as unfinished,
            unfinished.open("w", encoding="utf-8", errors="replace") as file,
        ):
            for record in result.records[: self.limit * result.samples]:
                file.write(json.dumps(record.to_dict(), ensure_ascii=False) + "\n")
