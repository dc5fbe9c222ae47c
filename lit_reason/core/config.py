"""What a recipe may say about optimisation. No torch import here: the command line reads this for its help."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

OptimizerName = Literal["adamw", "adamw8bit", "muon", "galore", "fira", "apollo", "apollo_mini", "loro"]


@dataclass(frozen=True)
class SubspaceConfig:
    """The low-rank subspace in which some optimizers keep their state.

    Args:
        rank: of the subspace; `apollo_mini` has 1 and `loro` that of `lm.lowrank`, whatever stands here.
        refresh_steps: optimizer steps between changes of the subspace; for `loro`, between exact steps.
        scale: factor on the updates of the matrices concerned (under a root for the APOLLOs). None is the
            literature's: 0.25 for `galore` and `fira`, 1 for `apollo`, 128 for `apollo_mini`.
        paper_exact: `fira` leaves nothing of the subspace in its residual, as the paper has it; the released code, and
            this by default, leaves the share `1 - scale`.
    """

    rank: int = 128
    refresh_steps: int = 200
    scale: float | None = None
    paper_exact: bool = False


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer and learning-rate schedule.

    Args:
        optimizer: `adamw` is torch's fused AdamW; `adamw8bit` keeps its state in 8 bits (extra `quant`). The others
            treat the matrices of hidden layers in their own way, and all else with AdamW: `muon` is torch's; `galore`,
            `fira`, `apollo` and `apollo_mini` keep their state in a subspace; `loro` trains the factors of
            `lm.lowrank`.
        lr: highest learning rate.
        hidden_lr: rate of the matrices of hidden layers (low-rank factors too), as a share of `lr`. Small models want
            a lower one than their embeddings and output layer do; `galore` has that built in, by its scale.
        weight_decay: decoupled decay of matrices; vectors (norms, biases) are never decayed.
        betas: decay of the two moments.
        eps: added to the denominator.
        schedule: shape after warm-up. `wsd` stays at the top and falls at the end. The last three fall as a cosine and
            start again low after each restart: `cosine_quick_recovery` of weight refactorization, `jagged_cosine` of
            ReLoRA, and `cosine_rewarm` of SPAM, which rises slowly at first.
        warmup: share of all optimizer steps over which the rate rises linearly from 0.
        final_lr: rate at the last step, as a share of `lr`; unused by `constant`.
        decay: share of all optimizer steps over which `wsd` falls.
        period_steps: optimizer steps between restarts; a callback that restarts something is given the same number.
        recovery_steps: optimizer steps over which the rate comes back after a restart.
        subspace: settings of the optimizers with a subspace.
    """

    optimizer: OptimizerName = "adamw"
    lr: float = 2e-5
    hidden_lr: float = 1.0
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    schedule: Literal[
        "constant", "linear", "cosine", "wsd", "cosine_quick_recovery", "jagged_cosine", "cosine_rewarm"
    ] = "cosine"
    warmup: float = 0.03
    final_lr: float = 0.1
    decay: float = 0.2
    period_steps: int | None = None
    recovery_steps: int = 10
    subspace: SubspaceConfig = SubspaceConfig()
