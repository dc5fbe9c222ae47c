"""ActorCriticRegime: what on-policy methods with a critic inherit, in which the critic may be left out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lit_reason.core.config import OptimConfig
from lit_reason.core.critic_config import CriticConfig
from lit_reason.core.on_policy import OnPolicyRegime, PolicyConfig
from lit_reason.core.ranks import from_all_ranks
from lit_reason.credit.rewards import GroupRewards
from lit_reason.credit.tokens import bilevel_gae, gae, token_rewards
from lit_reason.models.config import ModelConfig
from lit_reason.models.critic import Critic
from lit_reason.rollout.config import DialogueConfig, SamplingConfig
from lit_reason.rollout.policy_pack import Credited, PolicyPack, policy_packs
from lit_reason.rollout.trajectory import NOT_SAMPLED, Trajectory


class ActorCriticRegime(OnPolicyRegime):
    """A policy beside a critic, which says what a state is worth.

    Args:
        lm: the policy.
        optim: optimizer and schedule, of the critic too.
        sampling: how the policy samples.
        dialogue: rollouts a task, and their limits.
        policy: the loss of the policy.
        critic: the critic, and how it turns rewards into advantages; None for a method that needs none.
    """

    def __init__(
        self,
        lm: ModelConfig,
        optim: OptimConfig,
        sampling: SamplingConfig,
        dialogue: DialogueConfig,
        policy: PolicyConfig,
        critic: CriticConfig | None,
    ) -> None:
        super().__init__(lm, optim, sampling, dialogue, policy)
        self.critic_config = critic

    def configure_model(self) -> None:
        """Build policy and critic once."""
        super().configure_model()
        if self.critic_config is not None and not hasattr(self, "critic"):
            separate = self.critic_config.trunk == "separate"
            self.critic = Critic.beside(self.lm, self.lm_config, separate=separate)
            if self.critic.trunk is not None:
                self.spread(self.critic.trunk)
            if self.device_mesh is not None:
                self.critic.shard(self.device_mesh["data_parallel"])

    def by_critic(self, rollouts: Sequence[Trajectory]) -> list[Credited]:
        """Advantages by the critic's present values; a failed rollout has none.

        Args:
            rollouts: all of a round on this process.
        """
        assert self.critic_config is not None
        values = self._values(rollouts)
        raw = [self._advantage(t, v) for t, v in zip(rollouts, values, strict=True)]
        scaled = self._whitened(rollouts, raw) if self.critic_config.whiten else raw
        return [
            Credited(t, a, value_T=v, target_value_T=v + r)
            for t, a, v, r in zip(rollouts, scaled, values, raw, strict=True)
        ]

    def further_loss(self, hidden_TD: Tensor, pack: PolicyPack) -> Tensor | float:
        """Half the squared error of the critic, clipped as PPO does."""
        if self.critic_config is None:
            return 0.0
        assert pack.value is not None and pack.target_value is not None
        value_S = self.critic(hidden_TD, pack.ids, pack.positions, pack.cu_seqlens)[pack.index]
        error_S = (value_S - pack.target_value) ** 2
        if self.critic_config.clip is not None:
            held_S = pack.value + (value_S - pack.value).clamp(-self.critic_config.clip, self.critic_config.clip)
            error_S = torch.maximum(error_S, (held_S - pack.target_value) ** 2)
        return self.critic_config.weight * 0.5 * (pack.target_weight * error_S).sum()

    @torch.no_grad()
    def _values(self, rollouts: Sequence[Trajectory]) -> list[Tensor]:
        """The critic's value of the state in which each token was sampled, `[T]` a rollout; 0 for the first token."""
        found = []
        for trajectory in rollouts:
            blank = Credited(trajectory, torch.zeros(len(trajectory.ids)))
            pack = policy_packs([blank], 1, 1.0)[0].to(self.device)
            hidden = self.lm.hidden(pack.ids, pack.positions, pack.cu_seqlens)
            value_T = self.critic(hidden, pack.ids, pack.positions, pack.cu_seqlens)
            found.append(torch.cat([value_T.new_zeros(1), value_T[:-1]]).double().cpu())
        return found

    def _advantage(self, trajectory: Trajectory, value_T: Tensor) -> Tensor:
        c, turn_id_T = self.critic_config, torch.tensor(trajectory.turn_id)
        assert c is not None
        if trajectory.failure or not trajectory.sampled:
            return torch.zeros_like(value_T)
        reward_T = paid(trajectory, at_end=c.placement == "end")
        if c.estimator == "gae":
            return gae(reward_T, value_T, turn_id_T, gamma=c.gamma, lam=c.lam)
        between = {"turn_gamma": c.turn_gamma, "turn_lam": c.turn_lam}
        return bilevel_gae(reward_T, value_T, turn_id_T, gamma=c.gamma, lam=c.lam, **between)

    def _whitened(self, rollouts: Sequence[Trajectory], raw: list[Tensor]) -> list[Tensor]:
        masks = [(torch.tensor(t.turn_id) != NOT_SAMPLED) & (t.failure == "") for t in rollouts]
        own = torch.cat([a[m] for a, m in zip(raw, masks, strict=True)])
        everyone = torch.cat(from_all_ranks(own))
        deviation = everyone.std() if len(everyone) > 1 else everyone.new_ones(())
        return [(a - everyone.mean()) / (deviation + 1e-8) * m for a, m in zip(raw, masks, strict=True)]


def paid(trajectory: Trajectory, *, at_end: bool) -> Tensor:
    """The reward paid at each token of a rollout.

    Args:
        trajectory: with a reward at every token, or with rewards of turns, which are paid at the turns' last tokens.
        at_end: all of it at the last sampled token instead.

    Returns:
        `float64 [T]`, 0 on tokens that were not sampled.
    """
    turn_id_T = torch.tensor(trajectory.turn_id)
    if trajectory.token_rewards:
        reward_T = torch.tensor(trajectory.token_rewards, dtype=torch.float64)
        if at_end:
            last = (turn_id_T != NOT_SAMPLED).nonzero()[-1]
            reward_T = torch.zeros_like(reward_T).index_put((last,), reward_T.sum())
        return reward_T
    rewards = GroupRewards.of([trajectory.turn_rewards], [trajectory.outcome])
    rewards = rewards.flattened() if at_end else rewards
    return token_rewards(_paid_to_tokens(rewards.due_GK[0], trajectory), turn_id_T)


def _paid_to_tokens(due_K: Tensor, trajectory: Trajectory) -> Tensor:
    """Rewards of turns that had no room to sample a token go to the last turn before that sampled one."""
    due_K = due_K.clone()
    wrote = set(trajectory.turn_id) - {NOT_SAMPLED}
    for k in range(len(due_K) - 1, 0, -1):
        if k not in wrote:
            due_K[k - 1] += due_K[k]
            due_K[k] = 0.0
    return due_K
