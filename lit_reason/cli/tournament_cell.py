"""One cell of a study: its stages as runs of `fit`, in this process."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock

from lit_reason.cli.runs import arguments, quiet, run_fit, torch_threads
from lit_reason.errors import UserError
from lit_reason.studies.plan import BASE, Cell, Stage, Study, arm_of, base_of, options
from lit_reason.studies.results import CellResult, gather, read_result

LOGGER = "lightning.pytorch.loggers.CSVLogger"
BUDGET = "lit_reason.callbacks.training_budget.TrainingBudget"


def problem_folder(study: Study, task: str, out: Path) -> Path | None:
    """Where a task's generated problems lie; None when its data and model are the recipe's own."""
    return out / "problems" / task if study.tasks[task].problems else None


def stage_folder(study: Study, cell: Cell, number: int, out: Path) -> Path:
    """The run folder of a stage: the cell's own, or one below it when there are several."""
    home = out / "runs" / cell.folder
    return home / f"stage-{number}" if len(arm_of(study, cell).stages) > 1 else home


def stage_options(study: Study, cell: Cell, number: int, out: Path, trained_tokens: int | None) -> dict[str, Any]:
    """All options of one run: those of the study file, and those that place it in the study.

    Args:
        study: the study.
        cell: the cell.
        number: which stage, from 0.
        out: the study's folder.
        trained_tokens: the cell's budget; None: as long as the recipe says.
    """
    stage: Stage = arm_of(study, cell).stages[number]
    folder = stage_folder(study, cell, number, out)
    placed: dict[str, Any] = {
        "seed_everything": cell.seed,
        "data.seed": cell.seed,
        "data.cache_dir": str(out / "cache"),
    }
    problems = problem_folder(study, cell.task, out)
    if problems is not None:
        placed |= {"vars.folder": str(problems), "model.lm.path": str(problems / f"base-{cell.seed}")}
    if cell.is_base:
        placed["data.train_file"] = f"{problems}/base-data/train.jsonl"
    elif base_of(study, cell.task):
        placed["model.lm.path"] = str(stage_folder(study, Cell(cell.task, BASE, BASE, cell.seed), 0, out) / "export")
    if number:
        placed["model.lm.path"] = str(stage_folder(study, cell, number - 1, out) / "export")
    where = {"save_dir": str(folder.parent), "name": "", "version": folder.name}
    placed["trainer.logger"] = [{"class_path": LOGGER, "init_args": where}]
    if trained_tokens is not None or stage.share < 1:
        budget = {"trained_tokens": trained_tokens, "share": stage.share}
        placed["trainer.callbacks+"] = [{"class_path": BUDGET, "init_args": budget}]
    return {**placed, **options(study, cell, stage)}


def settings_key(study: Study, cell: Cell, out: Path, trained_tokens: int | None) -> str:
    """Digest of everything that decides a cell's result: the recipe and all options."""
    stages = [
        stage_options(study, cell, number, out, trained_tokens) for number in range(len(arm_of(study, cell).stages))
    ]
    problems = study.tasks[cell.task].problems
    recipe = yaml.safe_load(Path(study.recipe).read_text(encoding="utf-8"))
    parts = [recipe, stages, asdict(problems) if problems else None]
    text = json.dumps(parts, sort_keys=True, default=str).replace(str(out), "OUT")  # the folder may move
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def check_cell(study: Study, cell: Cell, out: Path) -> None:
    """Parse and check a cell's options without training, so that a slip shows before the first hour is spent.

    Raises:
        UserError: names the arm and what is wrong with it.
    """
    from lit_reason.cli.reason_cli import build

    stages = arm_of(study, cell).stages
    for number in range(len(stages)):
        given = stage_options(study, cell, number, out, None)
        try:
            cli = build("fit", arguments(study.recipe, given), with_trainer=False)
        except UserError as error:
            raise UserError(f"arm '{cell.arm}' on task '{cell.task}': {error}") from error
        callbacks = [str(callback.class_path).rpartition(".")[2] for callback in cli.config.trainer.callbacks or []]
        if (len(stages) > 1 or cell.is_base) and "HFExport" not in callbacks:
            raise UserError(
                f"arm '{cell.arm}': another run starts from its weights: its recipe needs callback HFExport"
            )


def run_cell(study: Study, cell: Cell, out: Path, trained_tokens: int | None, label: str) -> CellResult:
    """Train one cell, or read its result where it is finished.

    A cell that was interrupted goes on from its newest checkpoint when its recipe writes any, else it starts afresh.
    Another process at the same cell is waited for.

    Args:
        study: the study.
        cell: which cell.
        out: the study's folder.
        trained_tokens: see `stage_options`.
        label: stands before the progress bar.
    """
    from lit_reason.core.metrics_log import read_metrics

    home = out / "runs" / cell.folder
    home.mkdir(parents=True, exist_ok=True)
    key = settings_key(study, cell, out, trained_tokens)
    with FileLock(home.parent / f".{home.name}.lock"), quiet(), torch_threads(study.threads):
        done = read_result(home / "result.json", key)
        if done is not None:
            return done
        started = home / "settings.txt"
        if not (started.is_file() and started.read_text(encoding="utf-8") == key):
            shutil.rmtree(home)  # of other settings
            home.mkdir()
            started.write_text(key, encoding="utf-8")
        logs = []
        for number, _ in enumerate(arm_of(study, cell).stages):
            folder = stage_folder(study, cell, number, out)
            finished = folder / "finished"
            if not finished.is_file():
                _run_stage(study, cell, number, out, trained_tokens, label)
                finished.touch()
            logs.append(read_metrics(folder / "metrics.csv"))
        result = gather(cell, key, logs, study.score)
        result.write(home / "result.json")
        return result


def _run_stage(study: Study, cell: Cell, number: int, out: Path, trained_tokens: int | None, label: str) -> None:
    folder = stage_folder(study, cell, number, out)
    # One process: Lightning starts further ones by repeating the command line, which is that of the whole study.
    given = stage_options(study, cell, number, out, trained_tokens) | {"trainer.devices": 1, "trainer.num_nodes": 1}
    if (folder / "checkpoints").is_dir():
        given["resume"] = "auto"
    else:
        for left in ("metrics.csv", "config.yaml"):  # of a run that was killed
            (folder / left).unlink(missing_ok=True)
    run_fit(study.recipe, given, label, keep_bar=False)
