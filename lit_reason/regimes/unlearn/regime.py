"""Unlearning of chosen rows, with the losses of the literature and the scores of LUME (arXiv 2502.15097)."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from lit_reason.core.config import OptimConfig
from lit_reason.data.unlearning.pairs import RolePack
from lit_reason.data.unlearning.rows import Role
from lit_reason.errors import UserError
from lit_reason.metrics.means import Means
from lit_reason.models.config import ModelConfig
from lit_reason.models.language_model import LanguageModel
from lit_reason.regimes.unlearn.losses import UnlearningLoss
from lit_reason.regimes.unlearn.reference import Reference, ReferenceMode
from lit_reason.regimes.unlearn.scoring import ScoredRegime
from lit_reason.regimes.unlearn.step import Step
from lit_reason.rollout.config import SamplingConfig


class UnlearnRegime(ScoredRegime):
    """Make the rows to forget unlikely and keep the others, by a loss of the recipe's choice.

    Args:
        lm: the model that remembers.
        loss: what is minimised: `NPO`, `SimNPO`, `GA`, `GD`, `KL`, `IdkDPO`, `RMU`, `RetainOnly`, `Memorize`, or a
            class of your own.
        optim: optimizer and schedule.
        sampling: how answers are generated for scoring; the benchmark is greedy, up to 256 tokens.
        reference: where the model before training comes from, for losses that ask for it. `copy` holds it in memory;
            `adapter_off` is the model without its adapter; `cached` keeps one number a row, for losses of sums;
            `auto` takes `adapter_off` where a fresh adapter is trained, else `copy`.
        layers: decoder layers to train, from 0; null trains what the recipe trains (for `RMU` three layers).
        score_every: validations between two that generate too; 0 generates in `test` alone.
        mmlu: measure utility in `test` by MMLU, through lm-eval (extra `mmlu`; it downloads the questions).
    """

    learns = ("train/forget_loss", "rises")

    def __init__(
        self,
        lm: ModelConfig,
        loss: UnlearningLoss,
        optim: OptimConfig = OptimConfig(lr=1e-5, weight_decay=0.01, warmup=0.1),  # noqa: B008 (frozen)
        sampling: SamplingConfig = SamplingConfig(temperature=0.0, top_p=1.0),  # noqa: B008 (frozen)
        reference: ReferenceMode = "auto",
        layers: list[int] | None = None,
        score_every: int = 0,
        mmlu: bool = False,
    ) -> None:
        super().__init__(lm, optim, sampling, score_every, mmlu)
        self.loss, self.layers = loss, layers
        self.before = Reference(reference, loss, self.lm_config)
        self.step_meter = Means(("loss", "forget_loss", "retain_loss", "forget_accuracy", "retain_accuracy"))
        self._finite: torch.Tensor | None = None

    def setup(self, stage: str) -> None:
        """Tell the data module which rows the loss asks for.

        Args:
            stage: any of the trainer's.

        Raises:
            UserError: the data module has no rows to forget, or a package that scores is not installed.
        """
        if not hasattr(self._data, "anchor"):
            raise UserError(f"UnlearnRegime needs data UnlearnData, not {type(self._data).__name__}")
        self._data.anchor, self._data.partner = self.loss.anchor, self.loss.partner
        self._data.refuse = self.loss.refuse
        super().setup(stage)

    def spread(self, lm: LanguageModel) -> None:
        """Freeze the layers that are not to be trained, then lay the weights over the processes.

        Args:
            lm: the model, whole.
        """
        last = self.loss.trains_to
        layers = self.layers
        if layers is None and last is not None:
            layers = list(range(max(last - 2, 0), last + 1))
        if layers is not None:
            lm.train_layers(layers, last)
        super().spread(lm)

    # ---- the model before training ----

    def on_train_start(self) -> None:
        """Score every row that the loss compares with, once, where a number a row is all that is kept."""
        rows = self._data.trained
        if self.before.cached and not rows.reference:
            rows.reference.update(self.before.sums(self.lm, rows, self._data.score_tokens))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the cached numbers: the weights that gave them are gone."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["reference"] = dict(self._data.store.reference)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with the cached numbers of the model before training."""
        super().on_load_checkpoint(checkpoint)
        if self._data is not None and self._data.store is not None:
            self._data.store.reference.update(checkpoint.get("reference", {}))

    # ---- training ----

    def training_step(self, batch: RolePack, batch_idx: int) -> torch.Tensor:  # type: ignore[override]
        """The loss of one micro-batch, as its part of the step's."""
        step = Step(self.lm, batch, lambda: self.before.of(self.lm))
        loss = self.loss(step)
        self._record(step, loss.detach())
        return loss * self.micro_batches

    def _record(self, step: Step, loss: torch.Tensor) -> None:
        self._finite = torch.isfinite(loss) if self._finite is None else self._finite & torch.isfinite(loss)
        self.step_meter.update("loss", loss[None], 1 / self.micro_batches)
        if "stats" not in vars(step):  # a loss of inner states alone
            return
        for name, role in (("forget", Role.FORGET), ("retain", Role.RETAIN)):
            chosen = step.pack.role == role
            self.step_meter.update(f"{name}_loss", -step.stats.logp_S[chosen])
            self.step_meter.update(f"{name}_accuracy", step.stats.hit_S[chosen])

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Log the figures of the step; stop where the loss is no number any more.

        Raises:
            UserError: it is NaN or infinite.
        """
        every = getattr(self.trainer, "log_every_n_steps", 0)
        bad = (~self._finite if self._finite is not None else torch.tensor(False)).float()
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(bad)  # one process must not stop alone
        self._finite = None
        if every and (self.trainer.global_step + 1) % every == 0:
            self.log_meter(self.step_meter, "train")
        if bad.item():
            raise UserError(
                f"the loss is NaN or infinite at step {self.trainer.global_step}: {type(self.loss).__name__} with "
                f"optim.lr {self.optim_config.lr} has diverged. Lower optim.lr, clip gradients "
                "(trainer.gradient_clip_val), give GA, GD or KL a loss.ceiling, or take NPO, which is bounded"
            )
