"""What a fit collects: features of the texts it has read, on all processes, and the directions found in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info

from lit_reason.core.ranks import from_all_ranks
from lit_reason.core.run_folder import run_folder
from lit_reason.data.labelled.datamodule import LabelledData, LabelledPack
from lit_reason.errors import UserError
from lit_reason.kernels.head_loss import HeadOut
from lit_reason.steering.bank import FeatureBank, Features
from lit_reason.steering.collect import collected, contrast_states, segment_features, stacked
from lit_reason.steering.config import DirectionConfig, SteerConfig
from lit_reason.steering.direction_file import Directions, export_gguf, model_facts, save_directions
from lit_reason.steering.finder import solve


class Collection:
    """Features in bounded memory, what they were read from, and which texts were too short to give any.

    Args:
        config: how directions are found.
        seed: of draws.
    """

    def __init__(self, config: DirectionConfig, seed: int) -> None:
        self.config, self.bank = config, FeatureBank(config.cap, seed)
        self.short: set[int] = set()
        self.origin: dict[str, Any] = {}

    def begin(self, data: LabelledData, layers: Sequence[int]) -> None:
        """Note what is read from here on.

        Args:
            data: the texts.
            layers: whose outputs become features.

        Raises:
            UserError: the checkpoint that the run goes on from has features of something else.
        """
        segment = {"segment": self.config.segment, "first": self.config.first, "length": self.config.length}
        origin = {**data.provenance, "pairs": data.pair_of, "layers": list(layers), "segment": segment}
        other = [name for name, value in self.origin.items() if value != origin[name]]
        if other:
            raise UserError(
                f"the checkpoint has features of other texts, or read otherwise; what differs: {', '.join(other)}. "
                "Give data and direction as in the run that it is from"
            )
        self.origin = origin

    @torch.no_grad()
    def read(self, lm: Any, batch: LabelledPack, layers: Sequence[int]) -> tuple[HeadOut, Features]:
        """Run the model over some texts.

        Args:
            lm: the language model; dropout is off while it reads, for it would blur the states.
            batch: the texts.
            layers: whose outputs become features.

        Returns:
            The texts' likelihood, and the labelled features; a stand-in gives none.
        """
        pack, config = batch.pack, self.config
        lm.eval()
        with collected(lm.base, layers) as states:
            hidden = lm.hidden(pack.ids, pack.positions, pack.cu_seqlens)
            out = lm.head(hidden[pack.index], pack.targets, pack.target_weight)
        cut = segment_features(stacked(states, layers), pack.lengths, config.segment, config.first, config.length)
        self.short |= {int(batch.numbers[i]) for i in cut.short}
        labels, numbers = batch.labels.cpu()[cut.text_N], batch.numbers.cpu()[cut.text_N]
        kept = labels >= 0
        return out, Features(
            cut.features_NLF[kept],
            cut.norms_NL[kept],
            labels[kept].numpy(),
            numbers[kept].numpy(),
            cut.place_N[kept].numpy(),
        )

    def state(self) -> dict[str, Any]:
        """What all processes have collected. They call this together."""
        return {
            "banks": [state for state in from_all_ranks(self.bank.state()) if state],
            "short": sorted(set().union(*from_all_ranks(self.short))),
            "origin": self.origin,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Take in what a checkpoint holds.

        Args:
            state: of another run's collection.
        """
        self.bank.merge(state["banks"])
        self.short |= set(state["short"])
        self.origin = dict(state["origin"])

    def find(self, lm: Any, tokenizer: Any, steer: SteerConfig) -> Directions:
        """The directions in all that was collected. All processes call this together, and get the same.

        Args:
            lm: the language model.
            tokenizer: its tokenizer.
            steer: its strength and unit become those of the file.

        Raises:
            UserError: nothing was collected, or too little.
        """
        self.load(self.state())
        origin = self.origin
        if not origin:
            raise UserError("there are no directions: give model.file, or ckpt_path with a checkpoint of a fit")
        classes, layers = origin["classes"], origin["layers"]
        return solve(
            self.bank,
            layers,
            classes,
            replace(self.config, **origin["segment"]),
            width=lm.base.config.get_text_config().hidden_size,
            facts={
                "model": model_facts(lm.base, lm.config.path),
                "data_hash": origin["data_hash"],
                "split": origin["split"],
                "short_texts": len(self.short),
                "strength": steer.strength,
                "unit": steer.unit,
            },
            pair_of=origin["pairs"],
            contrasts=contrast_states(lm, tokenizer, self.config.contrast, layers, classes),
        )


def fit_figures(found: Directions) -> dict[str, float]:
    """What the log gets when the texts are read: the probe out of fold, the layer, and what each direction kept.

    Args:
        found: the directions.
    """
    facts = found.facts
    figures = {
        "probe_loss": facts["probe_loss_by_layer"][str(found.layer)],
        "probe_accuracy": facts["probe_accuracy"],
        "layer": float(found.layer),
        "short_texts": float(facts["short_texts"]),
    }
    figures |= {f"kept_{name}": float(counts["selected"]) for name, counts in facts["counts"].items()}
    figures |= {f"cosine_{pair.replace(' ', '_')}": cosine for pair, cosine in facts["cosines"].items()}
    return {f"train/{name}": value for name, value in figures.items()}


def write_directions(regime: Any, found: Directions, gguf: bool) -> None:
    """Write the file to the run folder, on the first process, and say what is in it.

    Args:
        regime: knows the trainer, and the file's name.
        found: the directions.
        gguf: write control vectors too.
    """
    folder = run_folder(regime.trainer)  # asks all processes
    if regime.trainer.is_global_zero:
        save_directions(found, folder / regime.collects)
        facts = found.facts
        kept = ", ".join(f"{name} {c['selected']} of {c['total']}" for name, c in facts["counts"].items())
        accuracy = f"{facts['probe_accuracy']:.0%} {'out of fold' if facts['folds'] else 'in sample'}"
        rank_zero_info(f"directions by {facts['method']} at layer {found.layer}, probe right in {accuracy}: {kept}")
        rank_zero_info(f"directions  {folder / regime.collects}")
        for file in export_gguf(found, folder) if gguf else ():
            rank_zero_info(f"control vector  {file}")
