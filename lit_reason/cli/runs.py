"""Runs inside another verb: `fit` in this process, quietly, under one progress bar."""

from __future__ import annotations

import json
import logging
import shutil
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_reason.errors import UserError

if TYPE_CHECKING:
    from lit_reason.cli.reason_cli import ReasonCLI

QUIET = {"trainer.enable_progress_bar": False, "trainer.enable_model_summary": False}


def arguments(recipe: str, options: Mapping[str, Any]) -> list[str]:
    """The command line of `fit`, behind the verb.

    Args:
        recipe: file or name.
        options: option names without dashes, and plain values; a name may end in `+` to append to a list.
    """
    return ["--config", recipe, *(f"--{name}={_text(value)}" for name, value in options.items())]


def _text(value: Any) -> str:
    """A value as the command line reads it: text as it is, anything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, default=str)


def clear_folder(out: Path, made: Collection[str], keep: Collection[str] = ()) -> None:
    """Remove what an earlier demo left in a folder; never anything else.

    Args:
        out: the folder.
        made: names of what a demo leaves there.
        keep: those of them that stay.

    Raises:
        UserError: it is a file, or holds other things.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"demo: --out {out} is a file; give a folder")
    found = {item.name for item in out.iterdir()} if out.is_dir() else set()
    if found - set(made) or (found and not {"data", "base"} <= found):
        stray = sorted(found - set(made)) or sorted(found)
        raise UserError(f"demo: --out {out} holds other things ({', '.join(stray[:3])}); give a new or empty folder")
    for name in found - set(keep):
        path = out / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def run_fit(recipe: str, options: Mapping[str, Any], label: str, *, keep_bar: bool = True) -> ReasonCLI:
    """Train as `lit-reason fit --config RECIPE --OPTION=VALUE ...` would.

    Args:
        recipe: file or name.
        options: see `arguments`.
        label: stands before the progress bar.
        keep_bar: leave the finished bar on the screen.

    Returns:
        The command line behind the run: `.model`, `.datamodule` and `.trainer` after training.
    """
    from lit_reason.cli.reason_cli import build

    cli = build("fit", arguments(recipe, {**options, **QUIET}))
    callbacks: list[Any] = cli.trainer.callbacks  # type: ignore[attr-defined]
    callbacks.append(step_bar(label, keep_bar))
    cli.run_verb()
    return cli


def step_bar(label: str, keep: bool = True) -> Any:
    """A callback: progress bar over optimizer steps that shows loss and accuracy.

    Args:
        label: stands before the bar.
        keep: leave the finished bar on the screen.
    """
    from lightning.pytorch import Callback
    from tqdm import tqdm

    class StepBar(Callback):
        bar: Any = None

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            total = int(trainer.estimated_stepping_batches)
            self.bar = tqdm(total=total, desc=label, unit=" steps", dynamic_ncols=True, leave=keep)
            self.bar.update(trainer.global_step)

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            seen = trainer.callback_metrics
            shown = {"loss": "train/loss", "accuracy": "val/pass@1"}
            figures = {name: f"{float(seen[key]):.3f}" for name, key in shown.items() if key in seen}
            self.bar.set_postfix(figures, refresh=False)
            self.bar.update(trainer.global_step - self.bar.n)

        def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
            if self.bar is not None:
                self.bar.close()

    return StepBar()


@contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """So many threads for torch's operations; None leaves them as they are.

    For matrices of the tiny students one is best: threads wait for each other more than they work, and far more on a
    busy machine.

    Args:
        count: number of threads.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def quiet() -> Iterator[None]:
    """Only errors, and our own lines and bars."""
    import lightning.pytorch  # noqa: F401 (its import sets the levels of its loggers)
    from transformers.utils import logging as transformers_logging

    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric", "transformers")]
    before = [logger.level for logger in loggers]
    bars = transformers_logging.is_progress_bar_enabled()
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        transformers_logging.disable_progress_bar()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
        if bars:
            transformers_logging.enable_progress_bar()
