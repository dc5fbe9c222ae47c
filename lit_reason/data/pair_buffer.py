"""Pairs of a demonstration and the policy's answer to the same prompt, on disk, round after round.

Tokens lie end to end in `tokens.bin` and are read by memory map; in memory are seven numbers a pair. A pair that comes
again is stored once.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lit_reason.data.reading.row_files import complete_or_absent
from lit_reason.errors import UserError

Replay = Literal["all", "last", "mixture"]
NONE: Mapping[str, int] = {}
COLUMNS = 7  # round, row, sample, where its tokens start, tokens of prompt, chosen and rejected
ROUND, ROW, SAMPLE, START, PROMPT, CHOSEN, REJECTED = range(COLUMNS)


@dataclass(frozen=True)
class Pair:
    """A prompt with two answers.

    Attributes:
        row: number of the demonstration.
        sample: which of the policy's answers to its prompt.
        prompt: tokens of the prompt, generation prompt included.
        chosen: tokens of the demonstrated answer, end token included where it has one.
        rejected: the same of the policy's answer.
    """

    row: int
    sample: int
    prompt: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray

    @property
    def identical(self) -> bool:
        """The policy answered as the demonstration does: nothing is learnt from such a pair."""
        return np.array_equal(self.chosen, self.rejected)


class PairBuffer:
    """Appends pairs, and says which of them a round trains on.

    A chunk of pairs is whole on disk or not there. `state` goes into a checkpoint; what was appended after it is
    dropped on `restore`, unless it is the beginning of just the round that is to be sampled next.

    Args:
        folder: for its files; made when it is missing.

    Attributes:
        index: seven numbers a pair.
        counts: of the last round, `repeated` pairs among them.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.clear()

    def clear(self) -> None:
        """Drop all pairs."""
        self.index = np.empty((0, COLUMNS), dtype=np.int64)
        self.counts: Counter[str] = Counter()
        self._starts: dict[bytes, int] = {}  # where the tokens of each different pair lie
        self._tokens = 0
        for name in ("tokens.bin", "index.bin"):
            (self.folder / name).write_bytes(b"")
        (self.folder / "progress.json").unlink(missing_ok=True)

    def __len__(self) -> int:
        return len(self.index)

    def append(
        self, number: int, step: int, chunk: int, pairs: Sequence[Pair], counts: Mapping[str, int] = NONE
    ) -> int:
        """Add a chunk of a round's pairs.

        Args:
            number: of the round.
            step: optimizer steps made when it was sampled.
            chunk: number of the chunk in its round.
            pairs: what to add.
            counts: whatever else was counted; `counts` adds it up over the round.

        Returns:
            How many of them the buffer knew already.
        """
        rows, written = [], []
        for pair in pairs:
            parts = [np.asarray(part, dtype=np.int32) for part in (pair.prompt, pair.chosen, pair.rejected)]
            key = _key(parts)
            if key not in self._starts:
                self._starts[key] = self._tokens
                self._tokens += sum(map(len, parts))
                written += parts
            rows.append([number, pair.row, pair.sample, self._starts[key], *map(len, parts)])
        known = len(pairs) - len(written) // 3
        self.counts = Counter({} if chunk == 0 else self.counts) + Counter({**counts, "repeated": known})
        with (self.folder / "tokens.bin").open("ab") as file:
            file.write(b"".join(part.tobytes() for part in written))
        with (self.folder / "index.bin").open("ab") as file:
            file.write(np.asarray(rows, dtype=np.int64).tobytes())
        self.index = np.concatenate([self.index, np.asarray(rows, dtype=np.int64).reshape(-1, COLUMNS)])
        done = {"round": number, "step": step, "chunks": chunk + 1, "counts": self.counts, **self._extent()}
        with complete_or_absent(self.folder / "progress.json") as unfinished:
            unfinished.write_text(json.dumps(done), encoding="utf-8")
        return known

    def pair(self, i: int) -> Pair:
        """Pair number `i`, read from disk.

        Args:
            i: its number.
        """
        _, row, sample, start, *lengths = self.index[i].tolist()
        tokens = np.memmap(
            self.folder / "tokens.bin", dtype=np.int32, mode="r", offset=4 * start, shape=(sum(lengths),)
        )
        return Pair(row, sample, *np.split(np.array(tokens), np.cumsum(lengths)[:-1]))

    def select(self, number: int, replay: Replay, *, mixture: float = 0.5, first: int = 0, seed: int = 0) -> np.ndarray:
        """The pairs that a round trains on, each once, in the order in which they were sampled.

        Args:
            number: of the round.
            replay: `last` that round's pairs alone, `all` with those of all before, `mixture` with a draw of these.
            mixture: share of pairs of earlier rounds, where there are enough of them.
            first: rounds before this one are never replayed.
            seed: of the draw.

        Returns:
            Numbers of pairs.
        """
        own = self._once(np.flatnonzero(self.index[:, ROUND] == number))
        earlier = np.flatnonzero((self.index[:, ROUND] < number) & (self.index[:, ROUND] >= first))
        earlier = self._once(earlier[~np.isin(self.index[earlier, START], self.index[own, START])])
        if replay == "last":
            return own
        if replay == "mixture":
            count = min(len(earlier), round(len(own) * mixture / (1 - mixture)))
            earlier = np.sort(np.random.default_rng([seed, number]).choice(earlier, count, replace=False))
        return np.concatenate([earlier, own])

    def _once(self, chosen: np.ndarray) -> np.ndarray:
        return chosen[np.sort(np.unique(self.index[chosen, START], return_index=True)[1])]

    # ---- checkpoints ----

    def state(self) -> dict[str, Any]:
        """Where the pairs are and how many, as plain values."""
        return {"folder": str(self.folder), **self._extent()}

    def restore(self, state: dict[str, Any], number: int, step: int) -> int:
        """Go back to a state.

        Args:
            state: as `state` gave it, by this run or by another one, whose files are then copied.
            number: round that is sampled next.
            step: optimizer steps made.

        Returns:
            Chunks of that round that are there already.

        Raises:
            UserError: the files are gone or cut.
        """
        origin, extent = Path(state["folder"]), {name: state[name] for name in self._extent()}
        progress = origin / "progress.json"
        found = json.loads(progress.read_text(encoding="utf-8")) if progress.is_file() else {}
        ahead = found.get("round") == number and found.get("step") == step and found["pairs"] >= extent["pairs"]
        extent = {name: found[name] for name in extent} if ahead else extent
        for name, size in (("tokens.bin", 4 * extent["tokens"]), ("index.bin", 8 * COLUMNS * extent["pairs"])):
            if not (origin / name).is_file() or (origin / name).stat().st_size < size:
                raise UserError(
                    f"the checkpoint counts on {extent['pairs']} pairs in {origin}, but {name} there is missing or "
                    "shorter: resume where that folder is, or start the run again"
                )
            if origin.resolve() != self.folder.resolve():
                shutil.copyfile(origin / name, self.folder / name)
            with (self.folder / name).open("rb+") as file:
                file.truncate(size)
        raw = np.fromfile(self.folder / "index.bin", dtype=np.int64)
        self.index, self._tokens = raw.reshape(-1, COLUMNS), extent["tokens"]
        self._starts = {}
        for i in range(len(self)):
            pair = self.pair(i)
            self._starts[_key([pair.prompt, pair.chosen, pair.rejected])] = int(self.index[i, START])
        if not ahead:
            (self.folder / "progress.json").unlink(missing_ok=True)
            return 0
        self.counts = Counter(found["counts"])
        return int(found["chunks"])

    def _extent(self) -> dict[str, int]:
        return {"pairs": len(self), "tokens": self._tokens}


def _key(parts: Sequence[np.ndarray]) -> bytes:
    """Equal for equal pairs; the lengths keep a prompt's end from passing for an answer's beginning."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(np.int64(len(part)).tobytes() + np.ascontiguousarray(part, dtype=np.int32).tobytes())
    return digest.digest()
