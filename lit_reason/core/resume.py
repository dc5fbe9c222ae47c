"""Where an interrupted run goes on: the newest whole checkpoint of the same recipe."""

from __future__ import annotations

import pickle
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_only

from lit_reason.core.checkpoint_io import clear_parts
from lit_reason.core.metrics_file import MetricsFile
from lit_reason.errors import UserError
from lit_reason.strategies.checkpoint_folder import META, left_behind

# What may change between two starts of one run: it alters how fast training goes, not what it computes.
FREE = {"workers", "cache_dir", "max_bad_rows", "gradient_checkpointing", "compile"}
DECIDING = ("seed_everything", "model", "data")  # parts of a recipe that must be equal
DECIDING_OF_TRAINER = ("accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm", "precision")


@dataclass(frozen=True)
class ResumePoint:
    """A checkpoint to go on from.

    Attributes:
        checkpoint: the file.
        folder: the run folder it belongs to; None when that is not known.
        step: optimizer steps behind it.
    """

    checkpoint: Path
    folder: Path | None
    step: int


def go_on(trainer: Any, given: str, recipe: Mapping[str, Any] | None) -> Path | None:
    """Choose the checkpoint to resume from, and make the run's folder the trainer's.

    Every process chooses for itself, before the first of them writes anything, and so all choose the same.

    Args:
        trainer: about to fit.
        given: `auto`, a checkpoint or a run folder.
        recipe: see `find`; a checkpoint that was asked for by name is taken whatever its recipe.

    Returns:
        The checkpoint; None to start afresh.

    Raises:
        UserError: what was asked for is missing or broken.
    """
    if given == "auto":
        point = find(run_folders(trainer), recipe, rank_zero_info, elsewhere=_elsewhere(trainer))
        if point is None:
            rank_zero_info(f"resume: no whole checkpoint of this recipe under {_root(trainer)}: starting afresh")
            return None
    else:
        point = _named(Path(given))
    folder = point.folder
    at_home = folder is not None and (folder.parent == _root(trainer) or not trainer.loggers)
    where = f"in {folder}" if at_home else "in a new run folder"
    rank_zero_info(f"resume: going on from {point.checkpoint}, step {point.step}, {where}")
    if folder is not None and at_home:
        if getattr(rank_zero_only, "rank", 0) == 0:
            clear_parts(folder / "checkpoints")
        number = folder.name.removeprefix("version_")
        for logger in trainer.loggers:
            if isinstance(logger, MetricsFile):
                logger.go_on_in(int(number) if number.isdigit() else folder.name)
            elif hasattr(logger, "_version"):
                logger._version = int(number) if number.isdigit() else folder.name
    return point.checkpoint


def _named(given: Path) -> ResumePoint:
    if (given / "checkpoints").is_dir():
        point = find([given], None, rank_zero_info)
        if point is None:
            raise UserError(f"resume: no whole checkpoint in {given / 'checkpoints'}")
        return point
    if not given.exists():
        raise UserError(f"resume: no such checkpoint or run folder: {given}; or auto")
    step = read_step(given)
    return ResumePoint(given, given.parent.parent if given.parent.name == "checkpoints" else None, step)


def _root(trainer: Any) -> Path:
    """The folder that holds the run folders."""
    if not trainer.loggers:
        return Path(trainer.default_root_dir)
    logger = trainer.loggers[0]
    return Path(logger.save_dir or trainer.default_root_dir) / str(logger.name or "")


def run_folders(trainer: Any) -> list[Path]:
    """Folders of earlier runs in which this one may go on: one where the recipe names the logger's version."""
    if not trainer.loggers:
        return [_root(trainer)]
    version = getattr(trainer.loggers[0], "_version", None)
    if version is not None:
        return [_root(trainer) / (version if isinstance(version, str) else f"version_{version}")]
    return [folder for folder in _root(trainer).glob("version_*") if folder.is_dir()]


def _elsewhere(trainer: Any) -> list[Path]:
    """Checkpoints in folders that the recipe names."""
    folders = {Path(c.dirpath) for c in trainer.checkpoint_callbacks if getattr(c, "dirpath", None)}
    return [p for folder in folders for p in (*folder.glob("*.ckpt"), *left_behind(folder)) if p.exists()]


def find(
    folders: Iterable[Path],
    recipe: Mapping[str, Any] | None,
    say: Callable[[str], None],
    elsewhere: Iterable[Path] = (),
) -> ResumePoint | None:
    """The newest whole checkpoint among run folders.

    Args:
        folders: run folders; their checkpoints lie in `checkpoints/`, their recipe in `config.yaml`.
        recipe: the present recipe; a folder of another one is passed over. None accepts all.
        say: is told what was passed over, and why.
        elsewhere: further checkpoints; they name their run folder themselves.

    Returns:
        None when there is none.
    """
    found: list[tuple[Path, Path | None]] = [(path, folder) for folder in folders for path in checkpoints(folder)]
    found += [(path, None) for path in elsewhere]
    other: dict[Path, str] = {}
    for path, home in sorted(found, key=lambda item: (item[0].stat().st_mtime_ns, str(item[0])), reverse=True):
        try:
            folder = home or _home(path)
            if folder not in other:
                other[folder] = difference(folder, recipe)
                if other[folder]:
                    say(f"resume: passed over {folder}: another recipe ({other[folder]})")
            if not other[folder]:
                return ResumePoint(path, folder, read_step(path))
        except UserError as error:
            say(f"resume: passed over {error}")
    return None


def checkpoints(folder: Path) -> list[Path]:
    """Checkpoints of a run folder in no order; links that lead nowhere are left out."""
    return [path for path in folder.glob("checkpoints/*.ckpt") if path.exists()] + left_behind(folder / "checkpoints")


def read_step(path: Path) -> int:
    """Check that a checkpoint is whole and can be gone on from.

    Args:
        path: a file, or a folder of shards.

    Returns:
        Its optimizer steps.

    Raises:
        UserError: it is broken, or holds weights alone.
    """
    content = _content(path)
    if "loops" not in content or "global_step" not in content:
        raise UserError(f"{path}: not a checkpoint of a run")
    if not path.is_dir() and "optimizer_states" not in content:
        raise UserError(f"{path}: weights alone, without the optimizer's state")
    return int(content["global_step"])


def _home(path: Path) -> Path:
    """The run folder that a checkpoint names; its own folder when it names none."""
    return Path((_content(path).get("step_boundary") or {}).get("folder") or path.parent)


def _content(path: Path) -> dict[str, Any]:
    if path.is_dir() and not (path / ".metadata").is_file():
        raise UserError(f"{path}: a folder without .metadata, so its shards were never all written")
    file = path / META if path.is_dir() else path
    try:
        with zipfile.ZipFile(file) as archive:
            bad = archive.testzip()
        if bad is not None:
            raise UserError(f"{path}: broken (its part {bad} is damaged)")
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        raise UserError(f"{path}: broken ({str(error).partition(chr(10))[0] or 'unreadable'})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a checkpoint of a run")
    return content


def difference(folder: Path, recipe: Mapping[str, Any] | None) -> str:
    """In what a run folder's recipe differs from the present one.

    Args:
        folder: a run folder; without a `config.yaml` it is taken for a run of this recipe.
        recipe: plain values; None takes any.

    Returns:
        The first differing key with both values; empty when they agree.
    """
    file = folder / "config.yaml"
    if recipe is None or not file.is_file():
        return ""
    try:
        earlier = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError:
        return "its config.yaml cannot be read"
    then, now = _flat(_deciding(earlier)), _flat(_deciding(recipe))
    for key in sorted(then.keys() | now.keys()):
        if key.rpartition(".")[2] not in FREE and then.get(key) != now.get(key):
            return f"{key} was {then.get(key)!r}, is {now.get(key)!r}"
    return ""


def _deciding(recipe: Mapping[str, Any] | None) -> dict[str, Any]:
    recipe = recipe or {}
    trainer = recipe.get("trainer") or {}
    return {key: recipe.get(key) for key in DECIDING} | {
        "trainer": {key: trainer.get(key) for key in DECIDING_OF_TRAINER}
    }


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    if isinstance(value, Mapping) and value:
        parts = (_flat(inner, f"{name}.{key}" if name else str(key)) for key, inner in value.items())
        return {key: found for part in parts for key, found in part.items()}
    return {name: list(value) if isinstance(value, tuple) else value}
