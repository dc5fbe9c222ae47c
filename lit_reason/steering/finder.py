"""From a bank of features to a file of directions: which layer, which probe, one direction a class.

Shape letters: N features, L layers, F feature width, D model width, s tokens of a segment.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lit_reason.errors import UserError
from lit_reason.models.adapters import decoder_layers
from lit_reason.steering.bank import FeatureBank, Features
from lit_reason.steering.collect import chosen_layers
from lit_reason.steering.config import DirectionConfig
from lit_reason.steering.direction import Evidence, find_direction
from lit_reason.steering.direction_file import Directions, cosines
from lit_reason.steering.probe import balanced, fit_probe, out_of_fold

BETAS = (0.3, 0.5, 0.7, 0.9)  # thresholds for which kept counts are told, beside the one that is used


def check_direction(config: DirectionConfig) -> None:
    """Refuse settings that cannot work.

    Args:
        config: how directions are found.

    Raises:
        UserError: which setting, what was given, what is allowed.
    """
    wrong = {
        "beta": not 0 <= config.beta < 1 and "a probability from 0 up to but not including 1",
        "first": config.first < 0 and "a position from 0 on",
        "length": (config.length is not None and config.length < 1) and "a number of tokens from 1 on, or null",
        "folds": (config.folds < 0 or config.folds == 1) and "0, or 2 and more",
        "penalty": config.penalty <= 0 and "above 0",
        "min_selected": config.min_selected < 1 and "1 or more",
        "cap": config.cap < 1 and "1 or more",
    }
    for name, allowed in wrong.items():
        if allowed:
            raise UserError(f"direction.{name} is {getattr(config, name)}; it must be {allowed}")
    if config.segment == "concat" and config.length is None:
        raise UserError("direction.segment concat needs direction.length, the number of tokens laid end to end")
    if config.method == "caa" and (config.segment != "token" or config.length is not None):
        raise UserError("direction.method caa reads the last token: set direction.segment to token and length to null")


def watched_layers(config: DirectionConfig, model: Any) -> list[int]:
    """Layers whose outputs are collected.

    Args:
        config: `layer`, or `layers` to choose from.
        model: a transformers model, without a peft wrapper.

    Raises:
        UserError: the model has no such layer.
    """
    last = len(decoder_layers(model)) - 1
    if config.layer is not None:
        wanted = [config.layer]
    elif config.layers:
        wanted = sorted(set(config.layers))
    else:
        wanted = sorted({round(x) for x in np.linspace(min(1, last), max(last - 1, 0), 8)})
    chosen_layers(model, wanted)
    return wanted


def probe_losses(
    held: Features, names: list[str], config: DirectionConfig, seed: int
) -> tuple[list[float], list[Tensor]]:
    """Log-loss of each layer's probe, all classes weighing the same, and its log-probabilities.

    Out of fold, or of a probe that has seen all texts where `folds` is 0.

    Args:
        held: features of all watched layers.
        names: of the K classes.
        config: folds and penalty.
        seed: of the folds.

    Returns:
        By layer: nats a feature, and `[N, K]`.
    """
    labels_N = torch.from_numpy(held.labels_N)
    losses, all_NK = [], []
    for at in range(held.features_NLF.shape[1]):
        x_NF = held.features_NLF[:, at]
        if config.folds:
            log_NK = out_of_fold(x_NF, held.labels_N, held.rows_N, names, config.penalty, config.folds, seed)
        else:
            log_NK = fit_probe(x_NF, labels_N, len(names), config.penalty).log_probs(x_NF)
        nll_N = -log_NK[torch.arange(len(labels_N)), labels_N].double()
        losses.append(float((balanced(labels_N, len(names)) * nll_N).mean()))
        all_NK.append(log_NK)
    return losses, all_NK


def solve(
    bank: FeatureBank,
    layers: Sequence[int],
    names: list[str],
    config: DirectionConfig,
    *,
    width: int,
    facts: Mapping[str, Any],
    pair_of: Mapping[int, str] | None = None,
    contrasts: Mapping[str, Tensor] | None = None,
) -> Directions:
    """Choose the layer whose probe knows the classes best, and find a direction towards each class there.

    Args:
        bank: the collected features.
        layers: the watched layers, as the bank has them.
        names: of the K classes.
        config: how directions are found.
        width: D.
        facts: provenance to add to the file's.
        pair_of: names of pairs by text number, for `caa`.
        contrasts: by class, `[L, s, D]` differences of two prompts, for `act_add`.

    Returns:
        The directions, with counts and probe figures among their facts.

    Raises:
        UserError: a class has no feature, or the method lacks what it needs.
    """
    held = bank.content() if bank else None
    missing = [name for k, name in enumerate(names) if held is None or not (held.labels_N == k).any()]
    if held is None or missing:
        raise UserError(
            f"class '{missing[0]}' has no text that is long enough: the segment begins at position {config.first} and "
            f"has {config.length if config.length else 'at least 1'} tokens (direction.first, direction.length)"
        )
    losses, log_probs = probe_losses(held, names, config, bank.seed)
    at = int(np.argmin(losses))
    x_NF = held.features_NLF[:, at].contiguous()
    evidence = Evidence(
        features_NF=x_NF,
        labels_N=held.labels_N,
        rows_N=held.rows_N,
        places_N=held.places_N,
        log_probs_NK=log_probs[at],
        probe=fit_probe(x_NF, torch.from_numpy(held.labels_N), len(names), config.penalty),
        names=names,
        pair_of=dict(pair_of or {}),
        contrasts={name: d[at] for name, d in (contrasts or {}).items()},
        seed=bank.seed,
    )
    wanted = list(range(len(names)))
    if config.method == "act_add":
        wanted = [k for k in wanted if names[k] in evidence.contrasts] or wanted
    found = {names[k]: find_direction(evidence, k, config) for k in wanted}
    vectors = {
        name: v.reshape(-1, width) if config.segment == "concat" and v.ndim == 1 else v
        for name, (v, _) in found.items()
    }
    order = list(vectors)
    return Directions(
        vectors,
        layers[at],
        float(held.norms_NL[:, at].median()),
        evidence.probe,
        {
            "classes": names,
            "method": config.method,
            "segment": config.segment,
            "first": config.first,
            "length": config.length,
            "beta": config.beta,
            "centered": config.center,
            "folds": config.folds,
            "penalty": config.penalty,
            "counts": {name: counts for name, (_, counts) in found.items()},
            "kept_by_beta": kept_by_beta(evidence, config),
            "texts": {n: len(np.unique(held.rows_N[held.labels_N == k])) for k, n in enumerate(names)},
            "probe_loss_by_layer": {str(layer): loss for layer, loss in zip(layers, losses, strict=True)},
            "probe_accuracy": float((log_probs[at].argmax(-1).numpy() == held.labels_N).mean()),
            "cosines": {f"{order[i]} {order[j]}": round(c, 4) for i, j, c in cosines([vectors[n] for n in order])},
            "seed": bank.seed,
            **facts,
        },
    )


def kept_by_beta(evidence: Evidence, config: DirectionConfig) -> dict[str, dict[str, int]]:
    """How many features of each class some thresholds would keep.

    Args:
        evidence: the features and their probabilities.
        config: its own `beta` is among the thresholds.
    """
    counts: dict[str, dict[str, int]] = {}
    for k, name in enumerate(evidence.names):
        sure = evidence.log_probs_NK[torch.from_numpy(evidence.of(k)), k].exp()
        counts[name] = {f"{beta:g}": int((sure > beta).sum()) for beta in sorted({*BETAS, config.beta})}
    return counts
