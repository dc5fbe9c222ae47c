"""PPO with rewards at the ends of turns: MT-PPO (arXiv 2505.11821 v2)."""

from __future__ import annotations

from lit_reason.core.actor_critic import ActorCriticRegime
from lit_reason.core.config import OptimConfig
from lit_reason.core.critic_config import CriticConfig
from lit_reason.core.policy_config import PolicyConfig
from lit_reason.models.config import ModelConfig
from lit_reason.rollout.config import DialogueConfig, SamplingConfig
from lit_reason.rollout.policy_pack import Credited
from lit_reason.rollout.trajectory import Trajectory


class PPORegime(ActorCriticRegime):
    """Raise the likelihood of tokens that led to more than the critic expected.

    Args:
        lm: the policy.
        optim: optimizer and schedule, of the critic too.
        sampling: how the policy samples; temperature 1 without truncation is the policy itself.
        dialogue: rollouts a task, and their limits.
        policy: the loss of the policy.
        critic: the critic, and how it turns rewards into advantages.
    """

    def __init__(
        self,
        lm: ModelConfig,
        optim: OptimConfig = OptimConfig(lr=1e-6, warmup=0.0, schedule="constant"),  # noqa: B008 (frozen)
        sampling: SamplingConfig = SamplingConfig(temperature=1.0, top_p=1.0),  # noqa: B008 (frozen)
        dialogue: DialogueConfig = DialogueConfig(group=1),  # noqa: B008 (frozen)
        policy: PolicyConfig = PolicyConfig(),  # noqa: B008 (frozen)
        critic: CriticConfig = CriticConfig(),  # noqa: B008 (frozen)
    ) -> None:
        super().__init__(lm, optim, sampling, dialogue, policy, critic)

    def credited(self, rollouts: list[Trajectory]) -> list[Credited]:
        """Advantages by the critic's present values."""
        return self.by_critic(rollouts)
