"""Learning rate as a share of the highest, a pure function of the optimizer step, so that it survives a resume."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

from lit_reason.core.config import OptimConfig
from lit_reason.errors import UserError

RESTARTING = ("cosine_quick_recovery", "jagged_cosine", "cosine_rewarm")
FLOOR = 0.001  # share of the rate with which `cosine_quick_recovery` starts again
REWARM_FLOOR = 0.01  # and `cosine_rewarm`


def lr_factor(step: int, total_steps: int, config: OptimConfig) -> float:
    """Share of the highest learning rate at an optimizer step.

    With `base` the warm-up and cosine over the whole run, `K` the period, `R` the recovery and `q` the last restart:

    * `cosine_quick_recovery` (Glentis et al., arXiv 2505.22922): for `t - q < R`, in which the rate comes back,
      `base(q + R) (0.001 + 0.999 (t - q) / (R - 1))`, else `base(t)`.
    * `jagged_cosine` (ReLoRA, Lialin et al., arXiv 2307.05695): `base(q) (t - q) / R` for `t - q < R`, else `base(t)`.
    * `cosine_rewarm` (SPAM, Huang et al., arXiv 2501.06842, with R = 150): for `t - q < R`,
      `base(t) (0.01 + 0.99 (1 - cos(pi (t - q) / R)) / 2)`, else `base(t)`.

    Args:
        step: optimizer steps made so far, from 0.
        total_steps: length of the run in optimizer steps.
        config: gives the shape.

    Returns:
        A factor in [0, 1]; past the end of the run it stays at its last value.
    """
    if config.schedule in RESTARTING and config.period_steps:
        last = step // config.period_steps * config.period_steps
        since, recovery = step - last, config.recovery_steps
        if since < recovery and restarts_at(last, total_steps, config):
            if config.schedule == "jagged_cosine":
                return since / recovery * _base(last, total_steps, config)
            if config.schedule == "cosine_rewarm":
                risen = 0.5 * (1 - math.cos(math.pi * since / recovery))
                return (REWARM_FLOOR + (1 - REWARM_FLOOR) * risen) * _base(step, total_steps, config)
            back = min(1.0, since / max(1, recovery - 1))
            return (FLOOR + (1 - FLOOR) * back) * _base(last + recovery, total_steps, config)
    return _base(step, total_steps, config)


def restarts_at(step: int, total_steps: int, config: OptimConfig) -> bool:
    """Whether training restarts after this many optimizer steps; what restarts, a callback decides.

    A restart falls on every multiple of `period_steps`, but for those in the warm-up and those so late that less than
    two recoveries or half a period would be left.

    Args:
        step: optimizer steps made.
        total_steps: length of the run.
        config: gives `period_steps`, `recovery_steps` and `warmup`.
    """
    period = config.period_steps
    if not period or step <= 0 or step % period or step < warmup_steps(total_steps, config):
        return False
    return total_steps - step >= max(2 * config.recovery_steps, period / 2)


def warmup_steps(total_steps: int, config: OptimConfig) -> int:
    """Optimizer steps of the warm-up."""
    return math.ceil(config.warmup * total_steps)


def _base(step: int, total_steps: int, config: OptimConfig) -> float:
    """Warm-up and one fall over the whole run; restarts never stretch it."""
    warm = warmup_steps(total_steps, config)
    if step < warm:
        return (step + 1) / (warm + 1)
    if config.schedule == "constant":
        return 1.0
    start = warm
    if config.schedule == "wsd":
        start = max(warm, total_steps - 1 - math.ceil(config.decay * total_steps))
    done = min(1.0, max(0.0, step - start) / max(1, total_steps - 1 - start))
    if config.schedule == "linear":
        fall = done
    elif config.schedule == "wsd":
        fall = math.sqrt(done)  # the shape that Hägele et al. (arXiv 2405.18392) found best
    else:
        fall = 0.5 * (1 - math.cos(math.pi * done))
    return 1.0 - (1.0 - config.final_lr) * fall


def build_schedule(optimizer: torch.optim.Optimizer, total_steps: int, config: OptimConfig) -> LambdaLR:
    """The recipe's learning-rate schedule as a torch scheduler stepped once an optimizer step.

    Args:
        optimizer: its groups' rates are scaled, each group's by its own warm-up where it has one.
        total_steps: length of the run in optimizer steps.
        config: gives the shape.

    Raises:
        UserError: a schedule with restarts has no period, or one that is shorter than its recovery.
    """
    if config.schedule in RESTARTING:
        if not config.period_steps:
            raise UserError(f"optim.schedule {config.schedule} needs optim.period_steps, the steps between restarts")
        if config.period_steps < config.recovery_steps:
            raise UserError(
                f"optim.period_steps is {config.period_steps}, below optim.recovery_steps {config.recovery_steps}: "
                "the rate would never come back"
            )
    shapes = [schedule_of(group, config) for group in optimizer.param_groups]
    return LambdaLR(optimizer, [partial(lr_factor, total_steps=total_steps, config=shape) for shape in shapes])


def schedule_of(group: Mapping[str, Any], config: OptimConfig) -> OptimConfig:
    """The schedule of one group of parameters, which may have a warm-up of its own.

    Args:
        group: of an optimizer.
        config: the recipe's.
    """
    return replace(config, warmup=group.get("warmup", config.warmup))
