"""Confident-direction steering (CONFST, arXiv 2503.02989): directions from labelled texts, added to a frozen model."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from lit_reason.core.regime import Regime
from lit_reason.core.run_folder import run_folder
from lit_reason.data.labelled.datamodule import LabelledPack
from lit_reason.data.prompts import EvalPrompt
from lit_reason.models.config import ModelConfig
from lit_reason.regimes.steering.answers import steered_answers
from lit_reason.regimes.steering.collection import Collection, fit_figures, write_directions
from lit_reason.regimes.steering.config import TrialConfig
from lit_reason.regimes.steering.held_out import HeldOut, check_history
from lit_reason.regimes.steering.page import write_trial
from lit_reason.regimes.steering.trial_run import Trying, check_trial, run_trial
from lit_reason.rollout.config import SamplingConfig
from lit_reason.steering.config import DirectionConfig, SteerConfig
from lit_reason.steering.direction_file import Directions, check_gguf, check_model, model_facts, read_directions
from lit_reason.steering.finder import check_direction, watched_layers
from lit_reason.steering.hook import check_steering


class SteeringRegime(Regime):
    """Finds a direction a class in one pass over labelled texts; no weight is changed.

    `fit` reads the texts and writes `directions.safetensors`; `validate` asks the probe about texts it has not seen;
    `test` generates with and without directions and has an independent judge compare; `predict` continues prompts.

    Args:
        lm: the model.
        direction: how directions are found.
        steer: how they are added by `test` and `predict`.
        trial: what `test` tries.
        sampling: how text is sampled.
        file: directions for `validate`, `test` and `predict`; default: those of the checkpoint.
        gguf: write each direction as a control vector for llama.cpp too (extra `gguf`).
    """

    collects = "directions.safetensors"
    learns = ("train/probe_loss", "falls")

    def __init__(
        self,
        lm: ModelConfig,
        direction: DirectionConfig = DirectionConfig(),  # noqa: B008 (frozen)
        steer: SteerConfig = SteerConfig(),  # noqa: B008 (frozen)
        trial: TrialConfig = TrialConfig(),  # noqa: B008 (frozen)
        sampling: SamplingConfig = SamplingConfig(max_new_tokens=40, temperature=0.9),  # noqa: B008 (frozen)
        file: str | None = None,
        gguf: bool = False,
    ) -> None:
        super().__init__(lm, sampling=sampling)
        check_direction(direction)
        check_steering(steer)
        check_trial(trial)
        self.direction, self.steer, self.trial, self.gguf = direction, steer, trial, gguf
        self.collection = Collection(direction, torch.initial_seed())
        self.directions: Directions | None = None if file is None else read_directions(file)
        # Lightning's loop, and DDP, want a loss that has a gradient: it is this one's, and always zero.
        self.anchor = nn.Parameter(torch.zeros(()))

    def configure_model(self) -> None:
        """Build the model, freeze it, and see whether the file's directions are of it."""
        super().configure_model()
        self.lm.requires_grad_(False)
        self.layers = watched_layers(self.direction, self.lm.base)
        if self.directions is not None:
            check_model(self.directions, model_facts(self.lm.base), self.steer.other_weights)

    def configure_optimizers(self) -> None:
        """None: nothing is optimised."""

    def found(self) -> Directions:
        """The directions, of the file or of all that was collected. All processes call this together."""
        if self.directions is None:
            self.directions = self.collection.find(self.lm, self.tokenizer, self.steer)
        return self.directions

    def on_fit_start(self) -> None:
        """Note what is read, and refuse a control vector that could not be written before any is."""
        super().on_fit_start()
        self.collection.begin(self._data, self.layers)
        if self.gguf:
            check_gguf(self.layers, self._data.classes, self.direction.one_token)

    def training_step(self, batch: LabelledPack, batch_idx: int) -> torch.Tensor:
        """Read some texts: their features go to the collection, their likelihood to the log."""
        self.log("train/probe_loss", math.log(len(self._data.classes)), batch_size=1)  # of knowing nothing yet
        out, features = self.collection.read(self.lm, batch, self.layers)
        self.collection.bank.add(features)
        self.directions = None
        self.record(self.train_meter, out, batch.pack)
        return 0.0 * self.anchor

    def on_train_epoch_end(self) -> None:
        """Find the directions, log how sure the probe is, and write the file."""
        found = self.found()
        self.log_dict(fit_figures(found), batch_size=1)
        write_directions(self, found, self.gguf)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what every process has collected."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["collection"] = self.collection.state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with it."""
        super().on_load_checkpoint(checkpoint)
        self.collection.load(checkpoint["collection"])

    def on_validation_epoch_start(self) -> None:
        """Have a probe, of what is collected so far."""
        if not self.trainer.sanity_checking:
            self.held_out = HeldOut(self.found(), self.direction, self._data.provenance, self.device)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Ask the probe about texts that it has not seen."""
        if not self.trainer.sanity_checking:
            self.record(self.val_meter, self.held_out.ask(self.lm, batch), batch.pack)

    def on_validation_epoch_end(self) -> None:
        """Log how good the probe is."""
        super().on_validation_epoch_end()
        if not self.trainer.sanity_checking:
            self.log_dict(self.held_out.figures(), batch_size=1)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Try every direction at every strength on the prompts, and write `steering.json` and `steering.html`."""
        data, found = self._data, self.found()
        check_history(found, data.provenance)
        trial = run_trial(self.lm, self.tokenizer, found, batch, data.parts["judge"], data.parts["val"], self._trying)
        self.log_dict(trial.figures(), batch_size=1)
        write_trial(trial, found, run_folder(self.trainer), self.trainer.is_global_zero)

    def predict_step(self, batch: list[EvalPrompt], batch_idx: int) -> list[dict[str, Any]]:
        """Continue prompts, each with its own mix or that of `steer.mix`."""
        return steered_answers(self.lm, self.tokenizer, self.found(), batch, self._trying)

    @property
    def _trying(self) -> Trying:
        return Trying(self.trial, self.steer, self.sampling, self._data.stop_ids)
