"""The trials on disk, in one SQLite file that several processes may share: what is claimed is claimed once."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lit_reason.errors import UserError
from lit_reason.regimes.shaping.trials import Trial

WAIT_S = 600.0  # for another process to let go of the file: it may be fitting a surrogate
TABLE = """\
CREATE TABLE IF NOT EXISTS study (digest TEXT);
CREATE TABLE IF NOT EXISTS trials (number INTEGER PRIMARY KEY, trial TEXT, status TEXT, owner TEXT, heard REAL);"""


class TrialStore:
    """Trials of one search.

    Args:
        path: the file; made where there is none.
        digest: of everything that decides a trial's result; a file of another search is refused.

    Raises:
        UserError: the file belongs to another search, or is no such file.
    """

    def __init__(self, path: Path, digest: str) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with self._open() as db:
                db.executescript(TABLE)
            with self._alone() as db:
                known = db.execute("SELECT digest FROM study").fetchone()
                if known is None:
                    db.execute("INSERT INTO study VALUES (?)", (digest,))
        except sqlite3.DatabaseError as error:
            raise UserError(f"search.store {path}: no store of trials: {error}") from error
        if known is not None and known[0] != digest:
            raise UserError(
                f"search.store {path} holds the trials of another recipe (explainers, search, attribution or inner "
                "runs differ): name another file"
            )

    def trials(self) -> list[Trial]:
        """All trials, in order."""
        with self._open() as db:
            return [trial for trial, _, _ in _read(db)]

    def claim(
        self,
        owner: str,
        done: Sequence[int],
        choose: Callable[[Sequence[Trial]], tuple[str, Sequence[float]] | None],
        lease_s: float,
    ) -> Trial | None:
        """A trial for a process, claimed in one step.

        What the process claimed before and has not done is given to it again, also when it is finished in the file: a
        process that goes on from a checkpoint repeats what came after it. Next comes what another process has left, and
        then a new trial.

        Args:
            owner: name of the process.
            done: trials it has behind it.
            choose: kind and weights of a new trial, from all there are.
            lease_s: seconds of silence after which a running trial counts as left.

        Returns:
            None when there is nothing to do now.
        """
        with self._alone() as db:
            rows = _read(db)
            for trial, whose, heard in rows:
                mine = whose == owner and trial.number not in done
                left = trial.status == "running" and whose != owner and heard < time.time() - lease_s
                if mine or left:
                    fresh = Trial(trial.number, trial.kind, trial.weights)
                    db.execute(
                        "UPDATE trials SET trial=?, status='running', owner=?, heard=? WHERE number=?",
                        (json.dumps(asdict(fresh)), owner, time.time(), fresh.number),
                    )
                    return fresh
            chosen = choose([trial for trial, _, _ in rows])
            if chosen is None:
                return None
            trial = Trial(len(rows), chosen[0], tuple(float(w) for w in chosen[1]))
            _write(db, trial, owner)
            return trial

    def heard(self, number: int) -> None:
        """Note that a trial goes on.

        Args:
            number: of the trial.
        """
        with self._open() as db:
            db.execute("UPDATE trials SET heard=? WHERE number=?", (time.time(), number))

    def record(self, trial: Trial, owner: str) -> None:
        """Write how a trial ended, over what was there.

        Args:
            trial: the trial.
            owner: who ran it.
        """
        with self._alone() as db:
            _write(db, trial, owner)

    def restore(self, trials: Iterable[Trial], owner: str) -> None:
        """Put back trials from a checkpoint that the file does not have.

        Args:
            trials: of the checkpoint.
            owner: of those that ran.
        """
        with self._alone() as db:
            have = {number for (number,) in db.execute("SELECT number FROM trials")}
            for trial in trials:
                if trial.number not in have:
                    _write(db, trial, owner)

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        db = sqlite3.connect(self.path, timeout=WAIT_S, isolation_level=None)
        try:
            yield db
        finally:
            db.close()

    @contextmanager
    def _alone(self) -> Iterator[sqlite3.Connection]:
        """A transaction that no other process can write beside: all of it or nothing reaches the file."""
        with self._open() as db:
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
            except BaseException:
                db.execute("ROLLBACK")
                raise
            db.execute("COMMIT")


def _read(db: sqlite3.Connection) -> list[tuple[Trial, str, float]]:
    rows = db.execute("SELECT trial, owner, heard FROM trials ORDER BY number").fetchall()
    return [(trial_from(json.loads(text)), owner, heard) for text, owner, heard in rows]


def _write(db: sqlite3.Connection, trial: Trial, owner: str) -> None:
    values = (trial.number, json.dumps(asdict(trial)), trial.status, owner, time.time())
    db.execute("INSERT OR REPLACE INTO trials VALUES (?, ?, ?, ?, ?)", values)


def trial_from(values: dict[str, Any]) -> Trial:
    """A trial from the plain values of a file or a checkpoint.

    Args:
        values: as `dataclasses.asdict` gave them.
    """
    return Trial(**{**values, "weights": tuple(values["weights"]), "curve": tuple(values["curve"])})
