"""What a probe knows of texts that it has not seen, and whether it has really not seen them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from lit_reason.data.labelled.datamodule import LabelledPack
from lit_reason.errors import UserError
from lit_reason.kernels.head_loss import HeadOut
from lit_reason.metrics.probe import ProbeMeter
from lit_reason.regimes.steering.collection import Collection
from lit_reason.steering.config import DirectionConfig
from lit_reason.steering.direction_file import Directions


class HeldOut:
    """Asks the probe of a file about held-out texts, read as those were that the directions come from.

    Args:
        found: the directions, with their probe.
        config: the recipe's settings; the threshold among them says which share would be kept.
        history: classes, hash and split of the texts.
        device: where the figures are kept.

    Raises:
        UserError: the file has no probe, or see `check_history`.
    """

    def __init__(
        self, found: Directions, config: DirectionConfig, history: Mapping[str, Any], device: torch.device
    ) -> None:
        check_history(found, history)
        if found.probe is None:
            raise UserError("the file of directions has no probe, and it is the probe that validate asks")
        self.probe, self.layer, self.device = found.probe, found.layer, device
        as_found = {name: found.facts[name] for name in ("segment", "first", "length")}
        self.collection = Collection(replace(config, **as_found), 0)
        self.meter = ProbeMeter(found.names, config.beta).to(device)

    def ask(self, lm: Any, batch: LabelledPack) -> HeadOut:
        """Add some texts to the figures.

        Args:
            lm: the language model.
            batch: the texts.

        Returns:
            The texts' likelihood.
        """
        out, features = self.collection.read(lm, batch, [self.layer])
        known = (self.probe.log_probs(features.features_NLF[:, 0]), features.labels_N, features.rows_N)
        self.meter.update(*(torch.as_tensor(x).to(self.device) for x in known))
        return out

    def figures(self) -> dict[str, torch.Tensor]:
        """What the log gets, over all processes."""
        return {f"val/{name}": value for name, value in self.meter.compute().items()}


def check_history(found: Directions, history: Mapping[str, Any]) -> None:
    """Refuse texts of other classes, and a split that would judge directions by the texts they were found in.

    Args:
        found: the directions.
        history: classes, hash and split of the texts at hand.

    Raises:
        UserError: which of the two, and what the file says.
    """
    if found.names != history["classes"]:
        raise UserError(
            f"the file's classes are {', '.join(found.names)}; those of data.history {', '.join(history['classes'])}"
        )
    split = found.facts.get("split")
    if found.facts.get("data_hash") == history["data_hash"] and split not in (None, history["split"]):
        wanted = ", ".join(f"data.{name} {value}" for name, value in split.items())
        raise UserError(
            "the directions were found in this very history, split in another way, so that they would be judged by "
            f"their own texts: set {wanted}, or give another data.history"
        )
