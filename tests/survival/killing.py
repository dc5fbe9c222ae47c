"""Runs in child processes that are killed at a chosen moment, and what they leave behind.

Children are forked from a process that has imported everything, so a run costs its training alone. Moments are
counted, not timed: every hook of the trainer, every part of a checkpoint, every row of the token cache, every rename
is one. So a moment can be named, and a run that was killed there can be repeated.
"""

from __future__ import annotations

import csv
import hashlib
import io
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import Callback
from lightning.pytorch.trainer import call
from tiny_run import arguments

from lit_reason.cli import door
from lit_reason.cli.reason_cli import build
from lit_reason.core.metrics_file import MetricsWriter
from lit_reason.data.datamodule import RowBuilder

SAVER = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint"}
CALLBACKS: list[dict[str, Any]] = [
    {
        "class_path": "VerifiedGeneration",
        "init_args": {"limit": 2, "sampling": {"max_new_tokens": 3, "temperature": 1.0}},
    },
    SAVER | {"init_args": {"every_n_train_steps": 2, "save_last": True}},
    SAVER | {"init_args": {"monitor": "val/loss", "filename": "best"}},
]


class Reaper:
    """Counts moments, and kills this process at one of them.

    Args:
        at: number of the last moment; None counts only.
        send: the signal.
    """

    def __init__(self, at: int | None, send: int = signal.SIGKILL) -> None:
        self.at, self.send, self.seen, self.pid = at, send, [], os.getpid()

    def tick(self, name: str) -> None:
        """One moment."""
        if os.getpid() != self.pid:
            return  # a loading process
        self.seen.append(name)
        if len(self.seen) == self.at:
            os.kill(self.pid, self.send)

    def around(self, owner: Any, name: str, label: Callable[..., str] | None = None) -> None:
        """Make the moments before and after each call of a function count."""
        inner = getattr(owner, name)

        def wrapped(*args, **kwargs):
            text = label(*args) if label else name
            self.tick(f"before {text}")
            out = inner(*args, **kwargs)
            self.tick(f"after {text}")
            return out

        setattr(owner, name, wrapped)

    def install(self) -> None:
        """Watch this process. It is a child, so nothing is ever put back."""
        self.around(call, "_call_callback_hooks", lambda trainer, hook, *a: hook)
        self.around(os, "replace")
        self.around(os, "fsync")
        self.around(MetricsWriter, "save", lambda *a: "metrics.csv")
        save, rows = torch.save, RowBuilder._token_rows

        def save_in_parts(obj, file, *args, **kwargs):
            buffer = io.BytesIO()
            save(obj, buffer, *args, **kwargs)
            data = buffer.getvalue()
            for i in range(4):
                file.write(data[i * len(data) // 4 : (i + 1) * len(data) // 4])
                file.flush()
                self.tick("checkpoint being written")

        def rows_with_ticks(builder, conversation):
            self.tick("token cache being written")
            return rows(builder, conversation)

        torch.save, RowBuilder._token_rows = save_in_parts, rows_with_ticks


class Recorder(Callback):
    """Writes the loss of each micro-batch, exactly, and a digest of the final weights."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def _write(self, text: str) -> None:
        with self.path.open("a") as file:
            file.write(text + "\n")

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        number = trainer.fit_loop.epoch_loop.batch_progress.total.ready
        self._write(f"{number} {float(outputs['loss']).hex()} {','.join(batch.row_ids)}")

    def on_fit_end(self, trainer, pl_module):
        digest = hashlib.sha256()
        for name, value in sorted(pl_module.state_dict().items()):
            digest.update(name.encode() + value.detach().contiguous().numpy().tobytes())
        self._write(f"weights {digest.hexdigest()}")


def start(
    folder: Path, run: Path, settings: dict[str, Any], *, at: int | None = None, send: int = signal.SIGKILL
) -> int:
    """Fit with `--resume auto` in a child process until it ends or is killed.

    Args:
        folder: holds `model` and `traces.jsonl`.
        run: the run's files; `losses.txt` and `moments.txt` and `output.txt` are added.
        settings: options, as for `tiny_run.arguments`.
        at: moment at which the signal is sent.
        send: the signal.

    Returns:
        The exit code; negative: the signal that ended it.
    """
    run.mkdir(parents=True, exist_ok=True)
    extra = {k: settings[k] for k in ("callbacks",) if k in settings}
    recipe = run / "callbacks.yaml"
    recipe.write_text(yaml.safe_dump({"trainer": {"callbacks": extra.get("callbacks", CALLBACKS)}}))
    options = {"trainer__max_steps": None, "data__cache_dir": run / "cache"}
    options |= {k: v for k, v in settings.items() if k not in extra}
    argv = [f"--config={recipe}", *arguments(folder, run, **options), "--resume=auto"]
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        _child(run, argv, at, send)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _child(run: Path, argv: list[str], at: int | None, send: int) -> None:
    code = 70
    try:
        out = os.open(run / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        sys.stdout = sys.stderr = os.fdopen(out, "w", buffering=1)
        for name in (None, "lightning", "lightning.pytorch", "lightning.fabric"):
            for handler in logging.getLogger(name).handlers:
                if type(handler) is logging.StreamHandler:
                    handler.setStream(sys.stderr)
        torch.set_num_threads(1)
        reaper = Reaper(at, send)
        reaper.install()

        def verb(words):
            cli = build(words[0], words[1:])
            cli.trainer.callbacks.insert(0, Recorder(run / "losses.txt"))
            cli.run_verb()
            return 0

        door.run_trainer_verb = verb
        code = door.main(["fit", *argv])
        (run / "moments.txt").write_text("\n".join(reaper.seen))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def losses(run: Path) -> dict[str, set[str]]:
    """All that was recorded for each micro-batch, by its number, and for the final weights."""
    found: dict[str, set[str]] = {}
    for line in (run / "losses.txt").read_text().splitlines():
        key, _, value = line.partition(" ")
        found.setdefault(key, set()).add(value)
    return found


def metrics(run: Path) -> list[dict[str, str]]:
    """Rows of the newest `metrics.csv`, without the measured times."""
    path = max(run.glob("lightning_logs/version_*/metrics.csv"), key=lambda p: p.stat().st_mtime_ns)
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [{k: v for k, v in sorted(row.items()) if v and not k.startswith("perf/")} for row in rows]
