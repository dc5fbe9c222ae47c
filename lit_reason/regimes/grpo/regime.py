"""Group-relative policy gradients on multi-turn rollouts: GRPO and MT-GRPO (arXiv 2505.11821)."""

from __future__ import annotations

from lit_reason.core.config import OptimConfig
from lit_reason.core.group_credit import by_group
from lit_reason.core.on_policy import OnPolicyRegime
from lit_reason.core.policy_config import PolicyConfig
from lit_reason.credit.group import CreditConfig, credit_rule
from lit_reason.errors import UserError
from lit_reason.models.config import ModelConfig
from lit_reason.rollout.config import DialogueConfig, SamplingConfig
from lit_reason.rollout.policy_pack import Credited
from lit_reason.rollout.trajectory import Trajectory


class GRPORegime(OnPolicyRegime):
    """Raise the likelihood of turns that went better than those of other rollouts of the same task.

    Args:
        lm: the policy.
        optim: optimizer and schedule.
        sampling: how the policy samples; temperature 1 without truncation is the policy itself.
        dialogue: rollouts a task, and their limits.
        policy: the loss.
        credit: how rewards of turns and outcome become advantages.
    """

    def __init__(
        self,
        lm: ModelConfig,
        optim: OptimConfig = OptimConfig(lr=1e-6, warmup=0.0, schedule="constant"),  # noqa: B008 (frozen)
        sampling: SamplingConfig = SamplingConfig(temperature=1.0, top_p=1.0),  # noqa: B008 (frozen)
        dialogue: DialogueConfig = DialogueConfig(),  # noqa: B008 (frozen)
        policy: PolicyConfig = PolicyConfig(),  # noqa: B008 (frozen)
        credit: CreditConfig = CreditConfig(),  # noqa: B008 (frozen)
    ) -> None:
        super().__init__(lm, optim, sampling, dialogue, policy)
        if policy.truncated == "bootstrap":
            raise UserError("policy.truncated bootstrap asks a critic for what was cut off: use PPORegime, or penalise")
        self.credit, self.rule = credit, credit_rule(credit.rule)

    def credited(self, rollouts: list[Trajectory]) -> list[Credited]:
        """The advantage of each token: that of its turn, or where tokens are rewarded its own, by the recipe's rule."""
        return by_group(rollouts, self.rule, self.credit, self.round_meter)
