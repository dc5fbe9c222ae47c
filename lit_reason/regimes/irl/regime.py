"""Inverse RL from demonstrations alone: a reward and a policy learn from each other, in rounds.

The reward is told to prefer demonstrations to what the policy answers now, the policy is then trained on that reward
(arXiv 2405.17888, arXiv 2503.13538; docs/regimes/irl.md). With `reward.model: policy` the reward is the policy's own
log-ratio, and one step does both (IRFT, SPIN arXiv 2401.01335, and DPO on the same pairs).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lit_reason.core.config import OptimConfig
from lit_reason.core.critic_config import CriticConfig
from lit_reason.core.group_credit import by_group
from lit_reason.core.on_policy import UPDATE_FIGURES
from lit_reason.core.policy_config import PolicyConfig
from lit_reason.credit.group import CreditConfig, credit_rule
from lit_reason.losses.preference import chi2_penalty, margin_loss
from lit_reason.metrics.means import Means
from lit_reason.models.config import ModelConfig
from lit_reason.regimes.irl import watch
from lit_reason.regimes.irl.answers import answer_logps, pair_pack
from lit_reason.regimes.irl.config import RewardConfig, RoundConfig
from lit_reason.regimes.irl.demonstrations import RoundBatch
from lit_reason.regimes.irl.reward_side import RewardSide
from lit_reason.rollout.config import DialogueConfig, SamplingConfig
from lit_reason.rollout.policy_pack import Credited, PolicyPack
from lit_reason.rollout.trajectory import Trajectory


class IRLRegime(RewardSide):
    """Rounds of three phases: the policy answers, the reward learns from pairs, the policy learns from the reward.

    Args:
        lm: the policy, which should have been fine-tuned on the demonstrations.
        optim: optimizer and schedule of the policy; the schedule spans the policy's steps of each round.
        sampling: how the policy answers; temperature 1 without truncation is the policy itself.
        rounds: what happens in a round.
        reward: the reward, and how it learns.
        policy: the policy's loss.
        credit: how scores become advantages within the rollouts of a prompt (`rloo`; `traj_mr` is GRPO's), where there
            is no critic.
        critic: a critic, which makes the policy's steps PPO; null for none.
    """

    learns = ("train/pair_accuracy", "rises")

    def __init__(
        self,
        lm: ModelConfig,
        optim: OptimConfig = OptimConfig(lr=1e-6, warmup=0.0, schedule="constant"),  # noqa: B008 (frozen)
        sampling: SamplingConfig = SamplingConfig(temperature=1.0, top_p=1.0),  # noqa: B008 (frozen)
        rounds: RoundConfig = RoundConfig(),  # noqa: B008 (frozen)
        reward: RewardConfig = RewardConfig(),  # noqa: B008 (frozen)
        policy: PolicyConfig = PolicyConfig(kl=0.05),  # noqa: B008 (frozen)
        credit: CreditConfig = CreditConfig(rule="rloo", scale="none"),  # noqa: B008 (frozen)
        critic: CriticConfig | None = None,
    ) -> None:
        super().__init__(lm, optim, sampling, DialogueConfig(group=rounds.group), policy, critic)
        self.credit, self.rule = credit, credit_rule(credit.rule)
        self.update_meter = Means((*UPDATE_FIGURES, *watch.FIGURES))
        self.prepare(rounds, reward)

    # ---- one step ----

    def training_step(self, batch: RoundBatch, batch_idx: int) -> Tensor:  # type: ignore[override]
        """One micro-batch of the reward's or of the policy's; the first of a phase does what comes before it."""
        self.place = batch
        self.rounds.enter(batch)
        loss: Tensor | None = None
        if batch.phase not in self.rounds.state.stopped:
            learn = self.reward_step if batch.phase == "reward" else super().training_step
            loss = learn(batch, batch_idx)  # type: ignore[operator]
        if loss is None or batch.phase in self.rounds.state.stopped:
            return self.rest()
        return loss + self.unused(batch.phase)

    def reward_step(self, batch: RoundBatch, batch_idx: int) -> Tensor:
        """The reward's loss on pairs: it should score what was demonstrated above what the policy answered."""
        c = self.reward_config
        pairs, reference_N2, norm = self.rounds.pairs_of(batch)
        pack = pair_pack(pairs, norm).to(self.device)
        if c.model == "policy":  # r = beta log(pi / reference)
            assert reference_N2 is not None
            score_N2 = c.beta * (answer_logps(self.lm, pack).view(-1, 2) - reference_N2.to(self.device))
        else:
            score_N2 = self.reward(pack.ids, pack.positions, pack.cu_seqlens).view(-1, 2)
        margin_N = score_N2[:, 0] - score_N2[:, 1]
        loss = (margin_loss(margin_N, c.loss) + c.chi2 * chi2_penalty(*score_N2.T)).sum()
        self.record_margins(loss.detach(), margin_N.detach(), norm)
        return self.normalise(loss, pack)

    # ---- the policy's side ----

    def play_round(self, batch: Any) -> list[PolicyPack]:
        """Rollouts, scored and credited; ends the policy's steps when it has gone too far from the round's start."""
        packs = super().play_round(batch)
        limit = self.round_config.max_round_kl
        if limit is not None or self.knows_start():
            moved = self.divergence(packs)
            self.note({"round_kl": moved})
            if limit is not None and moved > limit:
                self.rounds.stop("policy")
        return packs

    def player(self, sampling: SamplingConfig, dialogue: DialogueConfig) -> Any:
        """Answers prompts, one turn each."""
        return self.answer_player(sampling, dialogue.group)

    def rewarded(self, rollouts: list[Trajectory]) -> list[Trajectory]:
        """Answers with their normalised scores as rewards."""
        return self.scored(rollouts)

    def credited(self, rollouts: list[Trajectory]) -> list[Credited]:
        """Advantages by the critic, or by comparison with the other answers to the same prompt."""
        if self.critic_config is not None:
            return self.by_critic(rollouts)
        return by_group(rollouts, self.rule, self.credit, self.round_meter)

    def reference(self) -> Any:
        """The policy at the start of the round, or of the run."""
        return self.rounds.previous() if self.round_config.kl_reference == "previous" else self.initial()

    # ---- held-out pairs ----

    @torch.no_grad()
    def validation_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        """How often the reward prefers the better answer."""
        self.pair_meter.add(batch, self.held_out_margins(batch))

    def on_validation_epoch_end(self) -> None:
        """Log the accuracy on held-out pairs, with its interval."""
        self.log_meter(self.pair_meter, "val")
