"""Shaped rewards (arXiv 2504.16272): every token is paid its share of the reward, by explainers whose mix is searched.

One `fit` is a search: inner runs of the policy one after the other, each with other weights of the explainers, and a
Gaussian process over what they came to; then a final run with the weights found. Without `search` weights are fixed.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

from lit_reason.core.actor_critic import ActorCriticRegime
from lit_reason.core.config import OptimConfig
from lit_reason.core.critic_config import CriticConfig
from lit_reason.core.group_credit import by_group
from lit_reason.core.policy_config import PolicyConfig
from lit_reason.core.report import Section
from lit_reason.credit.group import CreditConfig, credit_rule
from lit_reason.metrics.means import Means
from lit_reason.models.config import ModelConfig
from lit_reason.regimes.shaping.config import SearchConfig, ShapingConfig
from lit_reason.regimes.shaping.inner_runs import InnerRuns
from lit_reason.regimes.shaping.page import credit_section, search_section
from lit_reason.regimes.shaping.searching import Searching
from lit_reason.regimes.shaping.token_rewards import FIGURES, TokenRewards
from lit_reason.rewards.attribution.config import AttributionConfig
from lit_reason.rewards.sequence_reward import SequenceReward
from lit_reason.rollout.config import DialogueConfig, SamplingConfig
from lit_reason.rollout.policy_pack import Credited
from lit_reason.rollout.trajectory import Trajectory


class ShapingRegime(Searching, ActorCriticRegime):
    """Pay the reward of an answer to its tokens, and find out which way of paying teaches best.

    Args:
        lm: the policy.
        optim: optimizer and schedule, of each inner run.
        sampling: how the policy samples; temperature 1 without truncation is the policy itself.
        dialogue: rollouts a task, and their limits; answers have one turn.
        policy: the loss.
        reward: of whole answers, as class and arguments; null: what the environment pays.
        shaping: the explainers, and their weights.
        attribution: how the explainers work.
        credit: how token rewards become advantages within a group, where there is no critic; a token is a step.
            `turn_rtg` with `leave_one_out` and `scale: none` is RLOO's baseline, `scale: group` GRPO's.
        critic: a critic, with which an inner run is PPO; null for none.
        search: the outer problem; null: the weights stay as `shaping` has them.
    """

    learns = ("train/reward", "rises")

    def __init__(
        self,
        lm: ModelConfig,
        optim: OptimConfig = OptimConfig(lr=1e-6, warmup=0.0, schedule="constant"),  # noqa: B008 (frozen)
        sampling: SamplingConfig = SamplingConfig(temperature=1.0, top_p=1.0),  # noqa: B008 (frozen)
        dialogue: DialogueConfig = DialogueConfig(max_turns=0),  # noqa: B008 (frozen)
        policy: PolicyConfig = PolicyConfig(),  # noqa: B008 (frozen)
        reward: SequenceReward | None = None,
        shaping: ShapingConfig = ShapingConfig(),  # noqa: B008 (frozen)
        attribution: AttributionConfig = AttributionConfig(),  # noqa: B008 (frozen)
        credit: CreditConfig = CreditConfig(),  # noqa: B008 (frozen)
        critic: CriticConfig | None = None,
        search: SearchConfig | None = None,
    ) -> None:
        super().__init__(lm, optim, sampling, dialogue, policy, critic)
        self.credit, self.rule = credit, credit_rule(credit.rule)
        self.token_rewards, self.token_meter = TokenRewards(shaping, attribution, reward), Means(FIGURES)
        self.weights = shaping.weights or (1 / len(shaping.explainers),) * len(shaping.explainers)
        self.inner = InnerRuns(search, shaping.explainers, policy.updates) if search else None
        same = search and replace(search, store=None, lease_s=0.0)
        decisive = repr((lm, optim, sampling, dialogue, policy, shaping, attribution, credit, critic, same))
        self.digest = hashlib.sha256(decisive.encode()).hexdigest()[:16]

    # ---- rounds ----

    def _play(self, tasks: Any, number: int, attempt: int = 0) -> list[Trajectory]:
        self.token_rewards.tasks = tasks
        return super()._play(tasks, number, attempt)

    def rewarded(self, rollouts: list[Trajectory]) -> list[Trajectory]:
        """The score of each answer as its outcome, and each token's share of it."""
        trial = self.inner and self.inner.trial
        paid, figures = self.token_rewards.pay(rollouts, trial.weights if trial else self.weights)
        for name, values in figures.items():
            self.token_meter.update(name, values)
        if self.inner is not None:
            cost = {
                "reward_calls": sum(figures["reward_calls"]),
                "sampled_tokens": float(sum(t.sampled for t in rollouts)),
            }
            self.inner.note_round(figures["score"], cost)
        return paid

    def credited(self, rollouts: list[Trajectory]) -> list[Credited]:
        """Advantages token by token."""
        if self.critic_config is not None:
            return self.by_critic(rollouts)
        return by_group(rollouts, self.rule, self.credit, self.round_meter)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Log the figures of the explainers beside those of every on-policy method."""
        super().on_before_optimizer_step(optimizer)
        every = getattr(self.trainer, "log_every_n_steps", 0)
        if every and (self.trainer.global_step + 1) % every == 0:
            self.log_meter(self.token_meter, "train")

    def page_sections(self) -> list[Section]:
        """What the page of a run shows beyond that of every run: trials, costs, tokens coloured by credit."""
        names = self.token_rewards.shaping.explainers
        weights = self.inner.trial.weights if self.inner and self.inner.trial else self.weights
        credit = credit_section(self.token_rewards.shown, names, weights, self.text_of)
        if self.inner is None:
            return [credit]
        return [search_section(self.inner.trials(), names, surrogate=self.inner.config.propose == "bayes"), credit]
