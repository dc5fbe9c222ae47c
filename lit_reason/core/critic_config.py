"""What a recipe may say about the critic. No torch import: the command line reads it for its help."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lit_reason.errors import UserError


@dataclass(frozen=True)
class CriticConfig:
    """The critic, and how it turns rewards into advantages.

    Args:
        trunk: `shared` reads the policy's hidden states; `separate` has a model of its own, as large as the policy.
        lr: its highest learning rate; null for the policy's. A shared trunk learns at the policy's, the value at this.
        warmup: share of all optimizer steps over which its rate rises from 0; null for `optim.warmup`. A policy that
            warms up for longer than its critic moves little before the critic knows what states are worth.
        weight: weight of the value loss, half the squared error, beside the policy's loss.
        clip: a value that has moved further than this from what it was when the round was played earns no gradient for
            moving on (PPO's value clip); null for none.
        estimator: `gae` runs over all sampled tokens; `bilevel_gae` over turns first, then within each.
        gamma: discount a token.
        lam: 0 trusts the critic's next value, 1 the return.
        turn_gamma: discount a turn (`bilevel_gae`).
        turn_lam: the same as `lam`, between turns (`bilevel_gae`).
        whiten: give the advantages of a round, over all processes, mean 0 and deviation 1.
        placement: where rewards are paid: `turn` each turn's at its own last token (MT-PPO), `end` all of them at the
            rollout's last token (the control: the same content, PPO-MR).
    """

    trunk: Literal["shared", "separate"] = "shared"
    lr: float | None = None
    warmup: float | None = None
    weight: float = 0.5
    clip: float | None = 0.2
    estimator: Literal["gae", "bilevel_gae"] = "gae"
    gamma: float = 1.0
    lam: float = 1.0
    turn_gamma: float = 1.0
    turn_lam: float = 1.0
    whiten: bool = True
    placement: Literal["turn", "end"] = "turn"

    def __post_init__(self) -> None:
        for name in ("gamma", "lam", "turn_gamma", "turn_lam", "warmup"):
            if getattr(self, name) is not None and not 0 <= getattr(self, name) <= 1:
                raise UserError(f"critic.{name} is {getattr(self, name)}; it must be in [0, 1]")
