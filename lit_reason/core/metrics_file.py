"""`metrics.csv` that survives: a resumed run goes on in the file, and a kill never costs rows that were in it."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.utilities.rank_zero import rank_zero_only


class MetricsWriter(ExperimentWriter):
    """Appends rows to a file, which may be there already.

    Attributes:
        rows: rows written and still to be written.
    """

    def __init__(self, log_dir: str, *, go_on: bool) -> None:
        self.go_on = go_on
        super().__init__(log_dir)
        self.rows = 0
        if go_on:
            self.metrics_keys, rows = _read(Path(self.metrics_file_path))
            self.rows = len(rows)

    def _check_log_dir_exists(self) -> None:
        if not self.go_on:
            super()._check_log_dir_exists()

    def log_metrics(self, metrics_dict: dict[str, Any], step: int | None = None) -> None:
        """Keep a row for the next `save`."""
        super().log_metrics(metrics_dict, step)
        self.rows += 1

    def keep(self, rows: int) -> None:
        """Cut the file to its first rows.

        Args:
            rows: how many stay; a row that a kill left half written is never among them.
        """
        self.save()
        path = Path(self.metrics_file_path)
        if path.is_file():
            keys, found = _read(path)
            _write(path, keys, found[:rows])
            self.rows = min(rows, len(found))

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        path = Path(self.metrics_file_path)
        _write(path, fieldnames, _read(path)[1])


class MetricsFile(CSVLogger):
    """Lightning's `CSVLogger` for runs that may be killed and resumed."""

    _go_on = False
    _early: int | None = None

    @classmethod
    def like(cls, logger: Logger) -> Logger:
        """This kind of logger in place of Lightning's plain one; others are returned as they are.

        Args:
            logger: any logger.
        """
        if type(logger) is not CSVLogger:
            return logger
        return cls(logger.save_dir, logger._name, logger._version, logger._prefix, logger._flush_logs_every_n_steps)

    def go_on_in(self, version: int | str) -> None:
        """Write into the folder of an earlier run, after what is there.

        Args:
            version: that run's.
        """
        self._version, self._go_on = version, True

    @property
    def experiment(self) -> Any:
        """The writer; on processes other than the first, one that does nothing."""
        if self._experiment is None and getattr(rank_zero_only, "rank", 0) == 0:
            Path(self.root_dir).mkdir(parents=True, exist_ok=True)
            self._experiment = MetricsWriter(self.log_dir, go_on=self._go_on)
        return super().experiment

    @property
    def rows(self) -> int:
        """Rows so far (on the first process)."""
        return self.experiment.rows

    @rank_zero_only
    def log_early(self, metrics: Mapping[str, Any], step: int) -> None:
        """Write a step's row before a checkpoint of that step is saved; the trainer's own call adds nothing then.

        Args:
            metrics: the row.
            step: its step.
        """
        self.log_metrics(dict(metrics), step)
        self.save()
        self._early = step

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:  # type: ignore[override]
        """Add a row, unless it is the one that `log_early` wrote."""
        early, self._early = self._early, None
        if early is None or early != step:
            super().log_metrics(metrics, step)


def _read(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    if not path.is_file():
        return [], []
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
        return list(reader.fieldnames or []), rows


def _write(path: Path, keys: Sequence[str], rows: Sequence[Mapping[str, str]]) -> None:
    part = path.with_name(f".{path.name}.part")
    with part.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=keys, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    os.replace(part, path)
