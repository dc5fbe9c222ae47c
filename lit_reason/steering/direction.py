"""From labelled features to one direction a class: confident selection (arXiv 2503.02989), its baselines and controls.

Of the paper, only the abstract could be read first-hand; where its text leaves a step open, the docstring says what
was chosen here. Shape letters: N features, F width, K classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lit_reason.errors import UserError
from lit_reason.steering.config import DirectionConfig
from lit_reason.steering.probe import Probe


@dataclass(frozen=True)
class Evidence:
    """What directions are found in.

    Attributes:
        features_NF: features of one layer.
        labels_N: their classes.
        rows_N: numbers of their texts.
        places_N: where in the text each begins.
        log_probs_NK: log-probability of each class by the probe that selects.
        probe: fitted on all features.
        names: of the K classes.
        pair_of: by text number, the name of the pair it belongs to; for `caa`.
        contrasts: by class, a difference found elsewhere; for `act_add`.
        seed: of random choices.
    """

    features_NF: Tensor
    labels_N: np.ndarray
    rows_N: np.ndarray
    places_N: np.ndarray
    log_probs_NK: Tensor
    probe: Probe
    names: list[str]
    pair_of: dict[int, str]
    contrasts: dict[str, Tensor]
    seed: int

    def of(self, target: int) -> np.ndarray:
        """Numbers of the features of a class."""
        return np.flatnonzero(self.labels_N == target)

    def class_mean(self, target: int) -> Tensor:
        """Mean feature of a class, `[F]`."""
        return self.features_NF[torch.from_numpy(self.of(target))].mean(0)

    def common_mean(self) -> Tensor:
        """Mean of the class means, `[F]`: a large class pulls it no more than a small one."""
        return torch.stack([self.class_mean(k) for k in range(len(self.names))]).mean(0)


def confident(evidence: Evidence, target: int, config: DirectionConfig) -> tuple[np.ndarray, str]:
    """Features of a class that the probe gives it with more than `beta`.

    Features of other classes are never kept, however the probe judges them: so beta 0 gives the class mean.

    Args:
        evidence: the features.
        target: number of the class.
        config: `beta`, and what to do when too few are left.

    Returns:
        Numbers of the kept features, and how they were chosen: `beta`, `topk` or `mean`.

    Raises:
        UserError: fewer than `min_selected` are left and `on_empty` is `error`.
    """
    mine = evidence.of(target)
    sure = evidence.log_probs_NK[torch.from_numpy(mine), target].double().exp().numpy()
    kept = mine[sure > config.beta]
    if len(kept) >= max(config.min_selected, 1):
        return kept, "beta"
    if config.on_empty == "mean":
        return mine, "mean"
    if config.on_empty == "topk":
        return np.sort(mine[np.argsort(-sure, kind="stable")[: max(config.min_selected, 1)]]), "topk"
    raise UserError(
        f"class '{evidence.names[target]}': {len(kept)} of {len(mine)} features have a probability above "
        f"direction.beta {config.beta:g}, min_selected is {config.min_selected}; the highest is {sure.max():.3f}. "
        "Lower beta, add texts, or set direction.on_empty to topk or mean"
    )


def same_count(evidence: Evidence, target: int, config: DirectionConfig) -> tuple[np.ndarray, str]:
    """As many features of a class as `confident` keeps, drawn without looking at the probe: the control.

    Args:
        evidence: the features.
        target: number of the class.
        config: as for `confident`.

    Returns:
        Numbers of the drawn features, and how their number was found.
    """
    kept, how = confident(evidence, target, config)
    rng = np.random.default_rng([evidence.seed, target])
    return np.sort(rng.choice(evidence.of(target), size=len(kept), replace=False)), how


Found = tuple[Tensor, dict[str, Any]]


def _average(choose: Callable[[Evidence, int, DirectionConfig], tuple[np.ndarray, str]]) -> Callable[..., Found]:
    def direction(evidence: Evidence, target: int, config: DirectionConfig) -> Found:
        kept, how = choose(evidence, target, config)
        mean_F = evidence.features_NF[torch.from_numpy(kept)].mean(0)
        if config.center:
            mean_F = mean_F - evidence.common_mean()
        return mean_F, {"selected": len(kept), "selected_by": how}

    return direction


def _class_mean(evidence: Evidence, target: int, config: DirectionConfig) -> Found:
    return evidence.class_mean(target), {"selected": len(evidence.of(target))}


def _mean_difference(evidence: Evidence, target: int, config: DirectionConfig) -> Found:
    others = torch.stack([evidence.class_mean(k) for k in range(len(evidence.names)) if k != target]).mean(0)
    return evidence.class_mean(target) - others, {"selected": len(evidence.of(target))}


def _caa(evidence: Evidence, target: int, config: DirectionConfig) -> Found:
    """Mean over pairs of the difference at each text's last token (arXiv 2312.06681)."""
    last: dict[int, int] = {}
    for number, (row, place) in enumerate(zip(evidence.rows_N, evidence.places_N, strict=True)):
        if int(row) not in last or place > evidence.places_N[last[int(row)]]:
            last[int(row)] = number
    pairs: dict[str, dict[bool, list[int]]] = {}
    for row, number in last.items():
        if row in evidence.pair_of:
            sides = pairs.setdefault(evidence.pair_of[row], {True: [], False: []})
            sides[int(evidence.labels_N[number]) == target].append(number)
    whole = [sides for _, sides in sorted(pairs.items()) if sides[True] and sides[False]]
    if not whole:
        raise UserError(
            f"direction.method caa: no pair of texts has '{evidence.names[target]}' on one side and another class on "
            "the other; name the field that pairs texts in data.pair_field"
        )
    x = evidence.features_NF
    gaps = [x[sides[True]].mean(0) - x[sides[False]].mean(0) for sides in whole]
    return torch.stack(gaps).mean(0), {"selected": len(gaps), "pairs": len(gaps)}


def _probe_weight(evidence: Evidence, target: int, config: DirectionConfig) -> Found:
    weight_KF = evidence.probe.weight_KF
    return weight_KF[target] - weight_KF.mean(0), {"selected": len(evidence.of(target))}


def _act_add(evidence: Evidence, target: int, config: DirectionConfig) -> Found:
    """Difference of two prompts' states, position by position (arXiv 2308.10248)."""
    name = evidence.names[target]
    if name not in evidence.contrasts:
        raise UserError(f"direction.method act_add: direction.contrast has no pair of prompts for '{name}'")
    return evidence.contrasts[name], {"selected": 1}


def _random(evidence: Evidence, target: int, config: DirectionConfig) -> Found:
    drawn = np.random.default_rng([evidence.seed, target]).standard_normal(evidence.features_NF.shape[1])
    return torch.from_numpy(drawn).float(), {"selected": 0}


METHODS: dict[str, Callable[[Evidence, int, DirectionConfig], Found]] = {
    "confident": _average(confident),
    "same_count": _average(same_count),
    "mean_difference": _mean_difference,
    "mean": _class_mean,
    "caa": _caa,
    "probe_weight": _probe_weight,
    "act_add": _act_add,
    "random": _random,
}


def find_direction(evidence: Evidence, target: int, config: DirectionConfig) -> Found:
    """The direction towards a class by the method that the settings name.

    Args:
        evidence: labelled features, and what the probe thinks of them.
        target: number of the class.
        config: method and its settings.

    Returns:
        Float32 `[F]` (for `act_add` `[s, D]`), and counts: `selected` of `total`, and how they were selected.

    Raises:
        UserError: the method lacks what it needs: confident features, pairs, prompts.
    """
    vector, counts = METHODS[config.method](evidence, target, config)
    if not bool(torch.isfinite(vector).all()) or not bool(vector.any()):
        raise UserError(f"class '{evidence.names[target]}': the direction by {config.method} is zero or not finite")
    return vector, {**counts, "total": len(evidence.of(target))}
