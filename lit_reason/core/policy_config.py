"""What a recipe may say about the policy's loss. No torch import: the command line reads it for its help."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lit_reason.errors import UserError


@dataclass(frozen=True)
class PolicyConfig:
    """The loss of a round of rollouts.

    Args:
        loss: `ppo` the clipped surrogate (arXiv 1707.06347, equation 7); `cispo` bounds the ratio and drops no token
            (arXiv 2506.13585); `reinforce` has no ratio, for one update a round.
        ratio: whose probability is compared with that under the policy that sampled: each `token`'s (GRPO, PPO), or the
            geometric mean over a `sequence`'s sampled tokens (GSPO, arXiv 2507.18071, equation 7) or over a `turn`'s.
            The latter move far less: clip them at about 3e-4.
        clip_low: room of the ratio below 1.
        clip_high: room of the ratio above 1; more than below is DAPO's clip-higher (arXiv 2503.14476).
        dual_clip: bound of terms with negative advantage, above 1; null for none.
        average: whose mean the loss is: of all sampled `token`s of the batch (DAPO), of `sequence`s, each the mean of
            its own tokens (GRPO, arXiv 2402.03300), or a `constant` divisor (Dr. GRPO, arXiv 2503.20783).
        updates: policy updates a round; from the second on the rollouts are off-policy.
        resample: how often at most groups without spread in their rewards are replaced by those of other tasks (DAPO's
            dynamic sampling); groups that are left without spread stay in the batch and in its divisor.
        truncated: rollouts that a limit cut off: `keep` them in the loss, `mask` them, `penalise` them with
            `overlong_penalty`, or `bootstrap` them: what the critic expects of the last state stands for what was cut.
        overlong_tokens: the last so many tokens below `dialogue.total_tokens` cost up to `overlong_penalty`, linearly
            (DAPO's soft punishment, equation 13); 0 costs nothing.
        overlong_penalty: subtracted from the outcome of a rollout that is as long as can be.
        kl: weight of the KL divergence to the model before training; 0 needs no reference. With an adapter the
            reference is the model without it, otherwise a frozen copy.
        kl_estimate: with d the reference's log-probability minus the policy's: k1 is `-d`, k2 `d^2 / 2`, k3
            `exp(d) - d - 1` (arXiv 2402.03300, equation 4).
        kl_in: `loss`, or `reward`: subtracted from each turn's reward before credit is assigned.
        importance: correction where the sampler's probabilities are not the trainer's (another engine, other
            precision): a constant weight on each token's term, the ratio of the two for the `token` or the whole
            `sequence`. The policy's own ratio then starts from the trainer's probabilities.
        importance_cap: largest weight.
        beyond_cap: `truncate` to the cap (truncated importance sampling), or `mask` what lies beyond.
        entropy: weight of the entropy bonus.
    """

    loss: Literal["ppo", "cispo", "reinforce"] = "ppo"
    ratio: Literal["token", "turn", "sequence"] = "token"
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    average: Literal["token", "sequence", "constant"] = "token"
    updates: int = 1
    resample: int = 0
    truncated: Literal["keep", "mask", "penalise", "bootstrap"] = "keep"
    overlong_tokens: int = 0
    overlong_penalty: float = 1.0
    kl: float = 0.0
    kl_estimate: Literal["k1", "k2", "k3"] = "k3"
    kl_in: Literal["loss", "reward"] = "loss"
    importance: Literal["none", "token", "sequence"] = "none"
    importance_cap: float = 2.0
    beyond_cap: Literal["truncate", "mask"] = "truncate"
    entropy: float = 0.0

    def __post_init__(self) -> None:
        for name, least in (("updates", 1), ("resample", 0), ("overlong_tokens", 0), ("overlong_penalty", 0)):
            if getattr(self, name) < least:
                raise UserError(f"policy.{name} is {getattr(self, name)}; it must be at least {least}")
        if self.importance_cap <= 0:
            raise UserError(f"policy.importance_cap is {self.importance_cap}; it must be positive")
        if self.loss == "reinforce" and self.updates > 1:
            raise UserError("policy.loss reinforce has no ratio and is wrong off-policy: set policy.updates to 1")
        if self.loss == "reinforce" and self.ratio != "token":
            raise UserError(f"policy.loss reinforce has no ratio: policy.ratio {self.ratio} needs ppo or cispo")
        if self.kl and self.kl_estimate == "k1" and self.kl_in == "loss":
            raise UserError(
                "policy.kl_estimate k1 has a gradient of 0 on average when it stands in the loss: it would be noise "
                "and no penalty; use k2 or k3, or policy.kl_in reward"
            )
