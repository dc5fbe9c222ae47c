"""RunReport: `report.html` in the run folder, one page that shows how the run went."""

from __future__ import annotations

import logging
import os
import platform
import shlex
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_info

import lit_reason
from lit_reason.callbacks.verified_generation import VerifiedGeneration
from lit_reason.core.evaluation import EvalRecord
from lit_reason.core.metrics_log import read_metrics
from lit_reason.core.report import Sample, clip, render_report
from lit_reason.core.rollout_page import rollout_section
from lit_reason.core.run_folder import run_folder
from lit_reason.core.run_page import RunFacts, run_page
from lit_reason.data.reading.row_files import complete_or_absent
from lit_reason.kernels.dispatch import backends_used
from lit_reason.models.config import ModelConfig

log = logging.getLogger(__name__)

SHARE_OF_TIME = 0.02  # a running run spends at most this much of its time on drawing its page
PACKAGES = ("torch", "lightning", "transformers", "peft", "bitsandbytes", "numpy")


class RunReport(Callback):
    """Writes one self-contained page (no network, no scripts) from the run's `metrics.csv`.

    It is written when training ends, also by an error or an interrupt, and renewed after validation while the
    run goes on, as long as drawing takes less than 2 % of the time. Put it last in the recipe's callbacks.
    Without a `CSVLogger` the page has no plots.

    Args:
        title: heading of the page; default: the name of the run's logger, or of its folder.
        samples: answers to held-out prompts to show, right and wrong ones in turn.
    """

    def __init__(self, title: str | None = None, samples: int = 10) -> None:
        self.title, self.samples = title, samples
        self._folder: Path | None = None
        self._written, self._cost = 0.0, 0.0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ask for the run folder while all processes are here to answer; an error may come to one alone."""
        self._folder = run_folder(trainer)
        self._written = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Renew the page while training, when that is cheap against the time since the last one."""
        since = time.perf_counter() - self._written
        if trainer.state.fn == "fit" and not trainer.sanity_checking and self._cost <= SHARE_OF_TIME * since:
            self._write(trainer, pl_module, "running")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the final page."""
        self._write(trainer, pl_module, "finished")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Write what there is, and what stopped the run."""
        stopped = isinstance(exception, KeyboardInterrupt | SystemExit)  # a signal to end is a SystemExit too
        reason = "" if stopped else f"{type(exception).__name__}: {exception}"
        self._write(trainer, pl_module, "stopped" if stopped else "failed", reason)

    def _write(self, trainer: Trainer, pl_module: LightningModule, status: str, alarm: str = "") -> None:
        if self._folder is None or not trainer.is_global_zero:
            return
        start = time.perf_counter()
        try:
            facts = run_facts(trainer, pl_module, self._folder, status, alarm, title=self.title, samples=self.samples)
            path = write_report(facts, self._folder, metrics_file(trainer, self._folder))
        except Exception:  # a page that cannot be drawn must not take the model, or the true error, with it
            log.exception("report.html could not be written")
        else:
            if status != "running":
                rank_zero_info(f"Report: {path}")
        self._written = time.perf_counter()
        self._cost = self._written - start


def write_report(facts: RunFacts, folder: Path, metrics: Path) -> Path:
    """Draw the page of a run and put it in place in one move.

    Args:
        facts: what the metrics do not say.
        folder: where `report.html` goes.
        metrics: the run's `metrics.csv`; may be missing.

    Returns:
        The page's file.
    """
    page = render_report(run_page(facts, read_metrics(metrics)))
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / "report.html"
    with complete_or_absent(target) as unfinished:
        unfinished.write_text(page, encoding="utf-8")
    return target


def metrics_file(trainer: Trainer, folder: Path) -> Path:
    """The `metrics.csv` of the run's `CSVLogger`, with all that was logged so far in it.

    Args:
        trainer: the run.
        folder: where to look when there is no `CSVLogger`.
    """
    for logger in trainer.loggers:
        if isinstance(logger, CSVLogger):
            logger.save()
            return Path(logger.log_dir) / "metrics.csv"
    return folder / "metrics.csv"


def run_facts(
    trainer: Any,
    pl_module: LightningModule,
    folder: Path,
    status: str,
    alarm: str = "",
    *,
    title: str | None = None,
    samples: int = 10,
) -> RunFacts:
    """Gather what the metrics do not say about a run.

    Args:
        trainer: the run; its data module may have a `ledger`, a callback may be a `VerifiedGeneration`.
        pl_module: what it trains; may have an `lm_config` (`ModelConfig`), and parts of the page (`page_sections`).
        folder: the run folder, where `config.yaml` lies.
        status: see `lit_reason.core.report.ReportData.status`.
        alarm: what went wrong.
        title: name of the run; default: the logger's or the folder's name.
        samples: answers to show.
    """
    generation = next((c for c in trainer.callbacks if isinstance(c, VerifiedGeneration)), None)
    last = generation.last if generation else None
    history = generation.history if generation else []
    config = folder / "config.yaml"
    name = trainer.logger.name if trainer.logger else None
    page_sections: Any = getattr(pl_module, "page_sections", None)
    return RunFacts(
        title=title or name or folder.name,
        method=type(pl_module).__name__.removesuffix("Regime"),
        model=model_name(getattr(pl_module, "lm_config", None)),
        status=status,
        alarm=alarm,
        problems=history[-1]["prompts"] if history else None,
        ledger=getattr(getattr(trainer, "datamodule", None), "ledger", {}),
        samples=choose_samples(last.records if last else (), samples),
        rollouts=rollout_section(folder / "rollouts.jsonl", partial(_text, pl_module)),
        own=page_sections() if callable(page_sections) else (),
        config=config.read_text(encoding="utf-8", errors="replace") if config.is_file() else "",
        command=shlex.join(sys.argv),
        versions=versions(trainer, pl_module),
        written=f"Written {time.strftime('%Y-%m-%d %H:%M %Z')} by lit-reason {lit_reason.__version__}.",
    )


def _text(pl_module: Any, ids: Sequence[int]) -> str:
    return pl_module.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def model_name(config: ModelConfig | None) -> str:
    """What is trained, in a few words: `SmolLM2-135M-Instruct, LoRA of rank 16`.

    Args:
        config: the model's part of the recipe.
    """
    if config is None:
        return ""
    start = (
        Path(config.path).name if config.path else f"{(config.config or {}).get('model_type', 'model')} from scratch"
    )
    if config.adapter is None:
        return start
    kind = "LoRA" if config.adapter.quantize == "none" else f"QLoRA ({config.adapter.quantize})"
    return f"{start}, {kind} of rank {config.adapter.rank}"


def choose_samples(records: Sequence[EvalRecord], limit: int) -> list[Sample]:
    """Answers to show: right and wrong ones in turn, in the order of the problems.

    Args:
        records: all answers of an evaluation.
        limit: how many to choose.
    """
    right = [r for r in records if r.correct]
    wrong = [r for r in records if not r.correct]
    turns = (r for pair in zip_longest(wrong, right) for r in pair if r is not None)
    return [_sample(record) for record in islice(turns, limit)]


def _sample(record: EvalRecord) -> Sample:
    notes = [f"expected {clip(record.answer, 80)}"] if record.answer is not None else []
    notes += [text for text in (record.reason, record.error) if text and text != "wrong"]
    return Sample(
        prompt=clip(record.prompt),
        completion=clip(record.completion),
        right=None if record.error else record.correct,
        title=record.row_id,
        note=" · ".join([*notes, f"{record.tokens} tokens"]),
    )


def versions(trainer: Trainer, pl_module: LightningModule) -> dict[str, str]:
    """Packages and machine, for the page's end.

    Args:
        trainer: gives the number of processes and the precision.
        pl_module: gives the device.
    """
    found = {"lit-reason": lit_reason.__version__, "python": platform.python_version()}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    found["system"] = f"{platform.system()} {platform.release()}, {platform.machine()}"
    found["processor"] = f"{_processor()}, {os.cpu_count()} cores, torch uses {torch.get_num_threads()}"
    if torch.cuda.is_available():
        found["GPU"] = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    found["processes"] = f"{trainer.world_size}, {type(trainer.strategy).__name__}, precision {trainer.precision}"
    if kernels := backends_used():
        found["head loss"] = ", ".join(f"{op} in {backend}" for op, backend in kernels.items())
    return found


def _processor() -> str:
    """The processor's name as Linux gives it, else what Python knows."""
    listing = Path("/proc/cpuinfo")
    lines = listing.read_text(errors="replace").splitlines() if listing.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
