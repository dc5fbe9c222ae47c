"""Restart: low-rank training starts anew every so many steps, from balanced factors and without old momentum."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from dataclasses import replace
from statistics import fmean
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lit_reason.core.config import OptimConfig
from lit_reason.core.momentum import FORGOTTEN, Reset, check_state, effective_lr, reset_momentum
from lit_reason.core.ranks import from_all_ranks
from lit_reason.core.schedules import RESTARTING, restarts_at
from lit_reason.errors import UserError, did_you_mean
from lit_reason.models.lowrank import LowRankLinear, lowrank_layers
from lit_reason.strategies.clipping import total_norm
from lit_reason.strategies.refactorization import Balance, Route, refactorize_layers

JUMP = 1e-2  # a refactorization that moves the loss by more is worth a warning


class Restart(Callback):
    """Refactorizes low-rank layers and resets momentum every `period_steps` optimizer steps (arXiv 2505.22922).

    A refactorization leaves the function as it is and balances the factors: B^T B = A^T A, diagonal. The schedule
    `cosine_quick_recovery` brings the learning rate back over `optim.recovery_steps`. There is no restart during
    warm-up, none near the end (`core.schedules.restarts_at`), and none after a step whose gradient was not finite.

    Logged at each restart: `restart/loss_before` and `restart/loss_after` the refactorization, on the step's last
    micro-batch; `restart/balance_defect`, the mean over layers of |B^T B - A^T A| / |B^T B| before; the mean and
    least `restart/stable_rank` of the products, and `restart/stable_rank_block_3` of those in block 3;
    `restart/effective_lr`, the root mean square of Adam's last update; `restart/skipped_layers`, left as they were
    because a factor is not finite; `restart/seconds`, `restart/count`.

    Args:
        period_steps: optimizer steps from one restart to the next; default: `optim.period_steps`.
        refactorize: balance the factors; False resets momentum alone.
        reset: `all` forgets both moments and the step counter of every trained parameter, as a new optimizer would;
            `first` forgets the first moment; `moments` both but not the counter (as SPAM does; the learning rate must
            then come back slowly); `none` refactorizes alone.
        check_loss: compute the loss before and after: two forward passes a restart.
        route: how sharded factors are balanced: `gather` one after the other, `tsqr` without gathering, or `auto`.
    """

    def __init__(
        self,
        period_steps: int | None = None,
        refactorize: bool = True,
        reset: Reset = "all",
        check_loss: bool = True,
        route: Route = "auto",
    ) -> None:
        if reset not in FORGOTTEN:
            raise UserError(
                f"Restart: reset is '{reset}'; allowed: {', '.join(FORGOTTEN)}{did_you_mean(reset, FORGOTTEN)}"
            )
        if not refactorize and reset == "none":
            raise UserError("Restart: neither refactorize nor reset is asked for; leave the callback out")
        self.period_steps = period_steps
        self.refactorize, self.reset, self.check_loss, self.route = refactorize, reset, check_loss, route
        self.last: dict[str, float] = {}
        self._count = 0
        self._seconds = 0.0
        self._last_step = 0  # of the latest restart
        self._step = 0  # optimizer steps seen
        self._pending = False  # due, and not made yet
        self._finite = True
        self._run: tuple[Any, Any] | None = None  # trainer and regime

    # ---- state ---------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Where in the cycle the run is, as plain numbers."""
        return {
            "period_steps": self.period_steps,
            "count": self._count,
            "seconds": self._seconds,
            "last_step": self._last_step,
            "step": self._step,
            "restart_pending": self._pending or self._not_seen_yet(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on in the middle of a cycle.

        Args:
            state_dict: what `state_dict` returned.
        """
        self._count, self._seconds = state_dict["count"], state_dict["seconds"]
        self._last_step, self._step = state_dict["last_step"], state_dict["step"]
        self._pending = state_dict["restart_pending"]

    def _not_seen_yet(self) -> bool:
        """Whether a step was made that a restart follows, and another callback saves before this one hears of it."""
        if self._run is None or self._run[0].global_step == self._step:
            return False
        return self._due(*self._run, self._run[0].global_step)

    # ---- when ----------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Know the run, to tell in a checkpoint whether a restart is due."""
        self._run = (trainer, pl_module) if stage == "fit" else None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a model without factors, and a schedule that does not recover as this callback restarts.

        Raises:
            UserError: the recipe contradicts itself.
        """
        if self.refactorize and not self._layers(pl_module):
            raise UserError("Restart: this model has no low-rank layers; set lm.lowrank, or refactorize: false")
        optim = self._optim(pl_module)
        if not optim.period_steps or optim.period_steps < 1:
            raise UserError(f"Restart: the period is {optim.period_steps}; set optim.period_steps to at least 1")
        if optim.period_steps < optim.recovery_steps:
            raise UserError(
                f"Restart: the period is {optim.period_steps} steps, shorter than optim.recovery_steps, "
                f"{optim.recovery_steps}: the learning rate would never come back"
            )
        theirs = pl_module.optim_config.period_steps  # type: ignore[union-attr]
        if optim.schedule in RESTARTING and theirs != optim.period_steps:
            raise UserError(
                f"Restart: period_steps is {optim.period_steps}, but optim.period_steps is {theirs}: the learning rate "
                "would come back at other steps than the run restarts; leave it out here"
            )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Make a restart that was due when the checkpoint was saved."""
        if self._pending:
            self._step = trainer.global_step
            self._restart(trainer, pl_module, batch)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Before a step that a restart is to follow, see whether its gradient is finite."""
        if self._due(trainer, pl_module, trainer.global_step + 1):
            gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            self._finite = math.isfinite(float(total_norm(gradients)))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Restart if an optimizer step has just been made and it is time."""
        if trainer.global_step == self._step:
            return  # a micro-batch within an optimizer step
        if self._step == 0:
            check_state(trainer.optimizers[0])
        self._step = trainer.global_step
        if not self._due(trainer, pl_module, self._step):
            return
        if not self._finite:
            rank_zero_warn(f"Restart: skipped at step {self._step}, because its gradient was not finite.")
            return
        self._pending = True
        self._restart(trainer, pl_module, batch)

    def _due(self, trainer: Any, pl_module: Any, step: int) -> bool:
        return restarts_at(step, int(trainer.estimated_stepping_batches), self._optim(pl_module))

    def _optim(self, pl_module: Any) -> OptimConfig:
        """The recipe's schedule with this callback's period."""
        found: OptimConfig = pl_module.optim_config
        return replace(found, period_steps=self.period_steps or found.period_steps)

    # ---- what ----------------------------------------------------------------------------------------------

    def _layers(self, pl_module: Any) -> list[tuple[str, LowRankLinear]]:
        return list(lowrank_layers(pl_module.lm))

    def _restart(self, trainer: Any, pl_module: Any, batch: Any) -> None:
        start = time.perf_counter()
        figures: dict[str, float] = {}
        if self.refactorize:
            if self.check_loss:
                figures["loss_before"] = _loss(pl_module, batch)
            names, layers = zip(*self._layers(pl_module), strict=True)
            found = refactorize_layers(layers, self.route)
            figures |= _summary(names, found)
            if self.check_loss:
                figures["loss_after"] = _loss(pl_module, batch)
        optimizer = trainer.optimizers[0]
        step_size = effective_lr(optimizer)
        if step_size is not None:
            figures["effective_lr"] = step_size
        reset_momentum(optimizer, self.reset)
        self._pending, self._last_step = False, self._step
        self._count += 1
        figures |= {"seconds": time.perf_counter() - start, "count": float(self._count)}
        self._seconds += figures["seconds"]
        self._say(trainer, figures)

    def _say(self, trainer: Any, figures: dict[str, float]) -> None:
        jump = abs(figures.get("loss_after", 0.0) - figures.get("loss_before", 0.0))
        if jump > JUMP:
            rank_zero_warn(
                f"Restart: the refactorization at step {self._step} moved the loss by {jump:.3g}: the dtype of the "
                "factors is too coarse for their values"
            )
        self.last = {f"restart/{name}": value for name, value in figures.items()}
        for logger in trainer.loggers:
            logger.log_metrics(self.last, step=trainer.fit_loop.epoch_loop._batches_that_stepped)
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in self.last.items()})

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what all restarts took."""
        if self._count:
            rank_zero_info(f"{self._count} restarts took {self._seconds:.1f} s in all")


@torch.no_grad()
def _loss(pl_module: Any, batch: Any) -> float:
    """Mean loss on a micro-batch over all processes, without dropout; no random number is drawn."""
    training = pl_module.training
    pl_module.eval()
    try:
        total = float(pl_module.score(batch).loss_sum)
    finally:
        pl_module.train(training)
    parts = from_all_ranks((total, float(batch.target_weight.sum())))
    loss, weight = (sum(part) for part in zip(*parts, strict=True))
    return loss / weight if weight else 0.0


def _summary(names: tuple[str, ...], found: list[Balance | None]) -> dict[str, float]:
    skipped = [name for name, balance in zip(names, found, strict=True) if balance is None]
    if skipped:
        rank_zero_warn(
            f"Restart: {len(skipped)} of {len(names)} layers keep their factors, because an entry is not finite or the "
            f"decomposition failed: {', '.join(skipped[:3])}{' ...' if len(skipped) > 3 else ''}"
        )
    balances = {name: balance for name, balance in zip(names, found, strict=True) if balance is not None}
    figures = {"skipped_layers": float(len(skipped))}
    if balances:
        ranks = {name: balance.stable_rank for name, balance in balances.items()}
        figures["balance_defect"] = fmean(balance.defect for balance in balances.values())
        figures |= {"stable_rank": fmean(ranks.values()), "stable_rank_min": min(ranks.values())}
        blocks: dict[str, list[float]] = defaultdict(list)
        for name, rank in ranks.items():  # `layers.3.self_attn.q_proj` lies in block 3
            blocks[next((part for part in name.split(".") if part.isdigit()), "")].append(rank)
        figures |= {f"stable_rank_block_{block}": fmean(of) for block, of in blocks.items() if block}
    return figures
