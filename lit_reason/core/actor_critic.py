"""ActorCriticRegime: what on-policy methods with a critic inherit, in which the critic may be left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn
from torch.nn import functional

from lit_reason.core.config import OptimConfig
from lit_reason.core.critic_config import CriticConfig
from lit_reason.core.group_credit import over_batch
from lit_reason.core.on_policy import OnPolicyRegime
from lit_reason.core.optim import Rate
from lit_reason.core.policy_config import PolicyConfig
from lit_reason.credit.rewards import GroupRewards
from lit_reason.credit.tokens import bilevel_gae, gae, token_rewards
from lit_reason.data.packing import Pack
from lit_reason.models.config import ModelConfig
from lit_reason.models.critic import Critic
from lit_reason.rollout.config import DialogueConfig, SamplingConfig
from lit_reason.rollout.policy_pack import Credited, PolicyPack, over_rollouts
from lit_reason.rollout.sampler import generating
from lit_reason.rollout.trajectory import NOT_SAMPLED, Trajectory


class ActorCriticRegime(OnPolicyRegime):
    """A policy beside a critic, which says what a state is worth.

    Args:
        lm: the policy.
        optim: optimizer and schedule, of the critic too; `critic.lr` and `critic.warmup` give it others.
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

    def own_rates(self) -> Mapping[nn.Parameter, Rate]:
        """The critic's, where the recipe gives it one."""
        c = self.critic_config
        own = Rate() if c is None else Rate(c.lr, c.warmup)
        return {} if own == Rate() else dict.fromkeys(self.critic.parameters(), own)

    def by_critic(self, rollouts: Sequence[Trajectory]) -> list[Credited]:
        """Advantages by the critic's present values; a failed rollout has none.

        Args:
            rollouts: all of a round on this process.
        """
        assert self.critic_config is not None
        values = self._values(rollouts)
        raw = [self._advantage(t, v) for t, v in zip(rollouts, values, strict=True)]
        found = [
            Credited(t, a, value_T=v[:-1], target_value_T=v[:-1] + a)
            for t, a, v in zip(rollouts, raw, values, strict=True)
        ]
        return over_batch(found) if self.critic_config.whiten else found

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
        """The critic's value of the state before each token and after the last, `[T + 1]` a rollout; 0 at the start."""

        def score(pack: Pack) -> Tensor:
            moved = pack.to(self.device)
            hidden = self.lm.hidden(moved.ids, moved.positions, moved.cu_seqlens)
            return self.critic(hidden, moved.ids, moved.positions, moved.cu_seqlens)

        trunks = [self.lm] if self.critic.trunk is None else [self.lm, self.critic.trunk]
        with ExitStack() as quiet:
            for trunk in trunks:
                quiet.enter_context(generating(trunk.hf))  # without dropout, as the sampler was
            found = over_rollouts(rollouts, self.trainer.accumulate_grad_batches, score)
        return [functional.pad(value_T.double(), (1, 0)) for value_T in found]

    def _advantage(self, trajectory: Trajectory, value: Tensor) -> Tensor:
        c, turn_id_T, value_T = self.critic_config, torch.tensor(trajectory.turn_id), value[:-1]
        assert c is not None
        if trajectory.failure or not trajectory.sampled:
            return torch.zeros_like(value_T)
        reward_T = paid(trajectory, at_end=c.placement == "end")
        if self.policy.truncated == "bootstrap" and not trajectory.finished:
            last = (turn_id_T != NOT_SAMPLED).nonzero()[-1]
            reward_T[last] += c.gamma * value[last + 1]
        if c.estimator == "gae":
            return gae(reward_T, value_T, turn_id_T, gamma=c.gamma, lam=c.lam)
        between = {"turn_gamma": c.turn_gamma, "turn_lam": c.turn_lam}
        return bilevel_gae(reward_T, value_T, turn_id_T, gamma=c.gamma, lam=c.lam, **between)


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
