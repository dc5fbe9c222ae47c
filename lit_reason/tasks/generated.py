"""A generated task on disk: problems to train on, problems to check on, an untrained student."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from lit_reason.errors import UserError, did_you_mean
from lit_reason.tasks.problem_file import write_problems
from lit_reason.tasks.student import write_student

KINDS = {"chain": "ChainConfig", "search": "SearchConfig"}  # modules of this room, and their configs


def task_config(kind: str, settings: Mapping[str, Any]) -> Any:
    """The config of a task.

    Args:
        kind: one of `KINDS`.
        settings: what differs from its defaults.

    Raises:
        UserError: no such task or setting, or a size that makes no problems.
    """
    if kind not in KINDS:
        raise UserError(f"no generated task '{kind}'{did_you_mean(kind, KINDS)}; there are {', '.join(KINDS)}")
    made = getattr(import_module(f"lit_reason.tasks.{kind}"), KINDS[kind])
    known = made.__dataclass_fields__
    for name in settings:
        if name not in known:
            raise UserError(f"{kind}: no setting '{name}'{did_you_mean(name, known)}; settings: {', '.join(known)}")
    return made(**settings)


def write_data(folder: Path, kind: str, config: Any, rows: int, held_out: int, seed: int) -> None:
    """Write `train.jsonl`, `heldout.jsonl`, and `answers.jsonl`: the training problems with an empty trace.

    Args:
        folder: for the files.
        kind: one of `KINDS`.
        config: as from `task_config`.
        rows: problems to train on.
        held_out: problems to check on, with values that training never sees.
        seed: seed of the problems.
    """
    task = import_module(f"lit_reason.tasks.{kind}")
    for name, count, side in (("train", rows, False), ("heldout", held_out, True)):
        write_problems(folder / f"{name}.jsonl", partial(task.record, config, seed, held_out=side), count)
    write_problems(
        folder / "answers.jsonl", lambda n: without_thoughts(task.record(config, seed, n, held_out=False)), rows
    )


def without_thoughts(record: dict[str, Any]) -> dict[str, Any]:
    """The row with nothing between its think markers: what is left is the answer."""
    user, reply = record["messages"]
    before, _, rest = reply["content"].partition("<think>")
    after = rest.partition("</think>")[2]
    return {**record, "messages": [user, {**reply, "content": f"{before}<think></think>{after}"}]}


def write_base(folder: Path, kind: str, config: Any, seed: int) -> None:
    """Write an untrained student that knows the words of a task.

    Args:
        folder: a plain Hugging Face folder; replaced when it exists.
        kind: one of `KINDS`.
        config: as from `task_config`.
        seed: seed of the weights.
    """
    write_student(folder, import_module(f"lit_reason.tasks.{kind}").words(config), seed=seed)


def prepare(folder: Path, kind: str, settings: Mapping[str, Any], rows: int, held_out: int, seed: int = 0) -> None:
    """Problems in a folder, unless those asked for are there already.

    Args:
        folder: gets the files, and `problems.json`, which says what they are and is written last.
        kind: one of `KINDS`.
        settings: what differs from the task's defaults.
        rows: problems to train on.
        held_out: problems to check on.
        seed: seed of the problems.
    """
    config = task_config(kind, settings)
    asked = json.dumps({"kind": kind, "config": vars(config), "rows": rows, "held_out": held_out, "seed": seed})
    note = folder / "problems.json"
    if note.is_file() and note.read_text(encoding="utf-8") == asked:
        return
    note.unlink(missing_ok=True)
    write_data(folder, kind, config, rows, held_out, seed)
    note.write_text(asked, encoding="utf-8")
