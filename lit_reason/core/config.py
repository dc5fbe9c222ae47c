"""What a recipe may say about optimisation. No torch import here: the command line reads this for its help."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer and learning-rate schedule.

    Args:
        optimizer: `adamw` is torch's fused AdamW; `adamw8bit` keeps its state in 8 bits (extra `quant`).
        lr: highest learning rate.
        weight_decay: decoupled decay of matrices; vectors (norms, biases) are never decayed.
        betas: decay of the two moments.
        eps: added to the denominator.
        schedule: shape after warm-up. `wsd` stays at the top and falls at the end. The last two fall as a cosine and
            start again low after each restart: `cosine_quick_recovery` of weight refactorization, `jagged_cosine` of
            ReLoRA.
        warmup: share of all optimizer steps over which the rate rises linearly from 0.
        final_lr: rate at the last step, as a share of `lr`; unused by `constant`.
        decay: share of all optimizer steps over which `wsd` falls.
        period_steps: optimizer steps between restarts; a callback that restarts something is given the same number.
        recovery_steps: optimizer steps over which the rate comes back after a restart.
    """

    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    lr: float = 2e-5
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    schedule: Literal["constant", "linear", "cosine", "wsd", "cosine_quick_recovery", "jagged_cosine"] = "cosine"
    warmup: float = 0.03
    final_lr: float = 0.1
    decay: float = 0.2
    period_steps: int | None = None
    recovery_steps: int = 10
