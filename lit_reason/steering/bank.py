"""Features in bounded memory: a draw from all that were seen, the same in whatever order they came.

Shape letters: N features, L layers, F feature width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor


def mixed(seed: int, rows_N: np.ndarray, places_N: np.ndarray) -> np.ndarray:
    """A number as good as random for every (seed, text, place), by the finaliser of SplitMix64.

    Args:
        seed: of the draw.
        rows_N: text numbers.
        places_N: places in the texts.

    Returns:
        `uint64 [N]`.
    """
    with np.errstate(over="ignore"):
        x = np.uint64(seed % 2**64) + rows_N.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 0x9E3779B97F4A7C15)):
            x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
            x = x + places_N.astype(np.uint64)
        return x ^ (x >> np.uint64(29))


class Features(NamedTuple):
    """Labelled features, ordered by text and place.

    Attributes:
        features_NLF: float32.
        norms_NL: length of the token states behind each.
        labels_N: `int64`, class numbers.
        rows_N: `int64`, numbers of the texts, unique in the whole history.
        places_N: `int64`, where in the text each begins.
    """

    features_NLF: Tensor
    norms_NL: Tensor
    labels_N: np.ndarray
    rows_N: np.ndarray
    places_N: np.ndarray


class FeatureBank:
    """Of every class, the features whose random numbers are the smallest, at most `cap` of them.

    A feature is known by its text and its place, and counts once however often it comes. So the content is a function
    of the set of features and the seed: not of their order, of the number of processes, or of an interruption.

    Args:
        cap: most features a class.
        seed: of the draw.
    """

    def __init__(self, cap: int, seed: int) -> None:
        self.cap, self.seed = cap, seed
        self._parts: list[Features] = []

    def __bool__(self) -> bool:
        return bool(self._parts)

    def add(self, part: Features) -> None:
        """Take features in.

        Args:
            part: in any order.
        """
        if not len(part.labels_N):
            return
        self._parts.append(part)
        if sum(len(p.labels_N) for p in self._parts[1:]) > self.cap:  # memory: the classes' caps and one more
            self.content()

    def content(self) -> Features:
        """What is held, without doubles and within the cap.

        Raises:
            ValueError: nothing was added.
        """
        whole = Features(*(_joined(list(column)) for column in zip(*self._parts, strict=True)))
        chosen = self._chosen(whole)
        kept = Features(whole.features_NLF[chosen], whole.norms_NL[chosen], *(x[chosen] for x in whole[2:]))
        self._parts = [kept]
        return kept

    def _chosen(self, whole: Features) -> np.ndarray:
        keys_N = mixed(self.seed, whole.rows_N, whole.places_N)
        kept: list[np.ndarray] = []
        for label in np.unique(whole.labels_N):
            mine = np.flatnonzero(whole.labels_N == label)
            _, first = np.unique(np.stack([whole.rows_N[mine], whole.places_N[mine]]), axis=1, return_index=True)
            once = mine[first]
            kept.append(once[np.argsort(keys_N[once], kind="stable")[: self.cap]])
        chosen = np.concatenate(kept)
        return chosen[np.lexsort((whole.places_N[chosen], whole.rows_N[chosen]))]

    def state(self) -> dict[str, Tensor]:
        """The content as tensors, for checkpoints and other processes; empty when there is none."""
        return {k: torch.as_tensor(v) for k, v in self.content()._asdict().items()} if self else {}

    def merge(self, states: Sequence[dict[str, Tensor]]) -> None:
        """Take in what other banks of the same seed and cap hold; what is known already does not count again.

        Args:
            states: of those banks.
        """
        for state in states:
            if state:
                arrays = [state[name].numpy() for name in ("labels_N", "rows_N", "places_N")]
                self.add(Features(state["features_NLF"], state["norms_NL"], *arrays))


def _joined(parts: list[Any]) -> Any:
    return torch.cat(parts) if isinstance(parts[0], Tensor) else np.concatenate(parts)
