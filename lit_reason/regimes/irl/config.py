"""What a recipe may say about rounds and rewards. No torch import: the command line reads it for its help."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lit_reason.core.critic_config import CriticConfig
from lit_reason.errors import UserError
from lit_reason.models.config import ModelConfig


@dataclass(frozen=True)
class RoundConfig:
    """What happens in a round. A round is an epoch of the trainer: `max_epochs` counts them.

    Args:
        prompts: prompts that the policy answers at a round's beginning; null answers that of every demonstration. With
            fewer, rounds go through the demonstrations section by section.
        samples: answers to each of them; a pair is made with each.
        reward_steps: most optimizer steps of the reward.
        policy_steps: most optimizer steps of the policy; 0 where the reward is the policy itself.
        group: rollouts of a prompt in the policy's steps.
        kl_reference: what `policy.kl` holds the policy to: the one at the start of the round (`previous`) or of the run
            (`initial`). With `previous` the drift over all rounds has no bound.
        max_round_kl: the policy's steps end once its divergence from the start of the round is above this, in nats a
            response; null for no limit.
        no_end_reward: reward of an answer that never ended, in place of its score; null scores it like others.
        unfinished: what becomes of a pair whose answer was cut off: `cut` the demonstration to the same length, so that
            no end token tells them apart, or `drop` the pair.
        critic_start: where a critic with a trunk of its own begins the policy's steps of a round: as the `reward` just
            learnt, whose score of the text so far is a first guess of its value, or where it is (`policy`: in the first
            round that is the policy's model, worth 0 everywhere).
        probe: pairs on which a round's figures are measured.
    """

    prompts: int | None = None
    samples: int = 1
    reward_steps: int = 100
    policy_steps: int = 100
    group: int = 4
    kl_reference: Literal["previous", "initial"] = "previous"
    max_round_kl: float | None = None
    no_end_reward: float | None = -1.0
    unfinished: Literal["cut", "drop"] = "cut"
    critic_start: Literal["policy", "reward"] = "policy"
    probe: int = 64

    def __post_init__(self) -> None:
        for name, least in (("samples", 1), ("reward_steps", 1), ("policy_steps", 0), ("group", 1), ("probe", 2)):
            if getattr(self, name) < least:
                raise UserError(f"rounds.{name} is {getattr(self, name)}; it must be at least {least}")
        if self.prompts is not None and self.prompts < 1:
            raise UserError(f"rounds.prompts is {self.prompts}; it must be at least 1, or null for all")


@dataclass(frozen=True)
class RewardConfig:
    """The reward, and how it learns from pairs.

    Args:
        model: a `network` of its own with a scalar head (explicit), or the `policy` itself, whose reward is
            `beta log(pi / reference)` (implicit: IRFT, SPIN, DPO).
        loss: of the margin between demonstration and answer: `linear` the gradient of maximum-likelihood inverse RL,
            `sigmoid` Bradley-Terry (with `model: policy`: SPIN, or DPO), `hinge`.
        beta: the implicit reward's temperature.
        reference: the implicit reward's reference: the policy at the start of the round (`previous`: IRFT, SPIN) or of
            the run (`initial`: DPO on the same pairs).
        chi2: weight of half the mean square of the scores, which bounds the linear loss; 0 for none.
        lr: learning rate of the network.
        schedule: of that rate, over the reward's steps of each round.
        start: each round's network begins `fresh`, from the policy's first weights and a new head, or `warm`.
        path: folder or hub id that a network begins from; default: the policy's model. With an adapter and without a
            path, policy and reward share one frozen base.
        replay: pairs of which rounds a reward learns from: `all` so far, the `last`, or a `mixture`.
        mixture: share of earlier rounds in a `mixture`.
        replay_from: rounds before this one are not replayed.
        stop_accuracy: the reward's steps end once it has told pairs apart this well over the last ten batches; above it
            there is little left to learn but style. 1 never ends them.
        stop_drop: they end, too, once accuracy on held-out pairs has fallen this far below its best of the round.
        check_every: steps between two looks at held-out pairs; 0 looks at none on the way.
    """

    model: Literal["network", "policy"] = "network"
    loss: Literal["linear", "sigmoid", "hinge"] = "sigmoid"
    beta: float = 0.1
    reference: Literal["previous", "initial"] = "previous"
    chi2: float = 0.0
    lr: float = 1e-5
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    start: Literal["fresh", "warm"] = "fresh"
    path: str | None = None
    replay: Literal["all", "last", "mixture"] = "all"
    mixture: float = 0.5
    replay_from: int = 0
    stop_accuracy: float = 0.9
    stop_drop: float = 0.05
    check_every: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.mixture < 1:
            raise UserError(f"reward.mixture is {self.mixture}; it must be in [0, 1)")
        if not 0.5 < self.stop_accuracy <= 1:
            raise UserError(f"reward.stop_accuracy is {self.stop_accuracy}; it must be above 0.5 and at most 1")
        if self.chi2 < 0 or self.beta <= 0:
            raise UserError(f"reward.chi2 is {self.chi2} and reward.beta {self.beta}; needed are >= 0 and > 0")


def check_together(rounds: RoundConfig, reward: RewardConfig, lm: ModelConfig, critic: CriticConfig | None) -> None:
    """Refuse settings that contradict each other.

    Args:
        rounds: of the recipe.
        reward: of the recipe.
        lm: of the recipe.
        critic: of the recipe.

    Raises:
        UserError: they do.
    """
    if reward.model == "policy" and rounds.policy_steps:
        raise UserError("reward.model policy has no policy step of its own: set rounds.policy_steps to 0")
    if reward.model == "network" and not rounds.policy_steps:
        raise UserError("reward.model network trains a reward that nothing uses: set rounds.policy_steps above 0")
    if reward.model == "policy" and reward.reference == "initial" and lm.path is None and lm.adapter is None:
        raise UserError("reward.reference initial needs lm.path or lm.adapter: this model began with random weights")
    if rounds.critic_start == "reward":
        if critic is None or critic.trunk != "separate" or reward.model != "network":
            raise UserError("rounds.critic_start reward needs critic.trunk separate and reward.model network")
        if lm.adapter is not None and reward.path is None:
            raise UserError(
                "rounds.critic_start reward needs a reward that is a model of its own: set reward.path, or leave out "
                "lm.adapter"
            )
