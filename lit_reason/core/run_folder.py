"""Where a run leaves its files."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import Trainer


def run_folder(trainer: Trainer) -> Path:
    """The folder of this run: `config.yaml`, `metrics.csv`, checkpoints, `report.html` and the export lie in it.

    Args:
        trainer: its first logger with a folder decides; without one, `default_root_dir`.
    """
    return Path(trainer.log_dir or trainer.default_root_dir)
