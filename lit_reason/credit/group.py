"""Credit rules that compare the rollouts of a group: one advantage for every turn of every rollout.

Each rule is a pure function `(GroupRewards, CreditConfig) -> advantage_GK`; the table `RULES` holds them by name. A
rule of your own has the same signature and is named `package.module:function` in a recipe.

Shape letters: G rollouts of one prompt, K turns of the longest of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lit_reason.credit.rewards import GroupRewards, to_go
from lit_reason.errors import UserError
from lit_reason.plugins import load_function


@dataclass(frozen=True)
class CreditConfig:
    """How rewards become advantages.

    Args:
        rule: name in `RULES`, or `package.module:function`.
        turn_coef: weight of the turn rewards' part (`mt_grpo`, `mt_grpo_k`).
        outcome_coef: weight of the outcome's part in a turn that also has a turn part (`mt_grpo`, `mt_grpo_k`); the
            alpha of the paper's second version.
        gamma: discount a turn (`turn_rtg`, `flat_content`), in [0, 1].
        scale: what advantages are divided by: nothing, or the standard deviation within the `group`. One number
            divides the whole group; never a deviation over those rollouts alone that reached a turn. `batch`: the
            advantages of all sampled tokens of the batch, over all processes, get mean 0 and deviation 1.
        leave_one_out: whether a rollout's baseline is the mean of the *others*, which keeps the estimate unbiased at
            any group size, or of all. For `turn_rtg`, `flat_content`, `rloo`; the others follow their papers (all).
        eps: added to a standard deviation before dividing by it.
    """

    rule: str = "turn_rtg"
    turn_coef: float = 1.0
    outcome_coef: float = 1.0
    gamma: float = 1.0
    scale: Literal["none", "group", "batch"] = "group"
    leave_one_out: bool = True
    eps: float = 1e-4

    def __post_init__(self) -> None:
        if self.rule == "reinforce_pp" and self.scale == "group":
            raise UserError("credit.rule reinforce_pp compares with the whole batch: set credit.scale to batch")


def traj_or(rewards: GroupRewards, config: CreditConfig) -> Tensor:
    """GRPO on the outcome alone: every turn gets the group-normalised outcome (GRPO-OR).

    Args:
        rewards: of one group.
        config: scale and eps are read.

    Returns:
        `float64 [G, K]`, 0 after a rollout's last turn.
    """
    return _spread(_normalised(rewards.outcome_G, config), rewards)


def traj_mr(rewards: GroupRewards, config: CreditConfig) -> Tensor:
    """GRPO on merged rewards: every turn gets the group-normalised sum of turn rewards and outcome (GRPO-MR).

    Args:
        rewards: of one group.
        config: scale and eps are read.

    Returns:
        `float64 [G, K]`, 0 after a rollout's last turn.
    """
    return _spread(_normalised(rewards.total_G, config), rewards)


def mt_grpo(rewards: GroupRewards, config: CreditConfig) -> Tensor:
    """MT-GRPO for two turns (arXiv 2505.11821, section on MT-GRPO).

    Turn rewards and outcome are normalised apart. The first turn gets `turn_coef * norm(sum of turn rewards) +
    outcome_coef * norm(outcome)`, all later turns `norm(outcome)`: they never see the turn reward. The authors' code
    merges both rewards for a rollout without a tool result; here its only turn is a first turn like any other.

    Args:
        rewards: of one group.
        config: coefficients, scale and eps are read.

    Returns:
        `float64 [G, K]`, 0 after a rollout's last turn.
    """
    outcome_G = _normalised(rewards.outcome_G, config)
    advantage_GK = _spread(outcome_G, rewards)
    turn_G = _normalised(rewards.turn_GK.sum(1), config)
    advantage_GK[:, 0] = config.turn_coef * turn_G + config.outcome_coef * outcome_G
    return advantage_GK


def mt_grpo_k(rewards: GroupRewards, config: CreditConfig) -> Tensor:
    """MT-GRPO carried over to K turns: each turn's reward normalised by turn number, plus the normalised outcome.

    Stopped rollouts take part in every later turn with reward 0. Normalising over those alone that reached the turn
    would punish taking another turn, since a rollout's own decision to stop would choose its baseline. A turn does not
    see what it makes possible later: where early turns enable later rewards, this rule is biased and `turn_rtg` is not.

    Args:
        rewards: of one group.
        config: coefficients, scale and eps are read.

    Returns:
        `float64 [G, K]`, 0 after a rollout's last turn.
    """
    outcome_G1 = _normalised(rewards.outcome_G, config)[:, None]
    turn_GK = _normalised(rewards.turn_GK, config)
    return (config.turn_coef * turn_GK + config.outcome_coef * outcome_G1) * rewards.alive_GK


def turn_rtg(rewards: GroupRewards, config: CreditConfig) -> Tensor:
    """Return-to-go from each turn, minus that of the other rollouts from the same turn on.

    `Q_ik` sums the rewards of rollout i from turn k on, the outcome at its last turn, nothing after it; the baseline is
    the mean of `Q_jk` over the other rollouts, those that have stopped included with 0. It does not depend on what
    rollout i does, so with `scale: none` the policy gradient is unbiased.

    Args:
        rewards: of one group.
        config: gamma, leave_one_out, scale and eps are read; the scale is the largest deviation of `Q_k` at any turn k.
            That of the totals alone would be 0 where all earn the same on different turns, and divide by `eps`.

    Returns:
        `float64 [G, K]`, 0 after a rollout's last turn.
    """
    q_GK = to_go(rewards.due_GK, config.gamma)
    advantage_GK = (q_GK - _baseline(q_GK, config)) * rewards.alive_GK
    return advantage_GK / _scale(q_GK, config)


def flat_content(rewards: GroupRewards, config: CreditConfig) -> Tensor:
    """The control for placement: `turn_rtg` on the same rewards, all of them paid at the end.

    A turn-level rule that does not beat this one owes its gain to what is rewarded, not to where.

    Args:
        rewards: of one group.
        config: as for `turn_rtg`.

    Returns:
        `float64 [G, K]`, 0 after a rollout's last turn.
    """
    return turn_rtg(rewards.flattened(), config)


def rloo(rewards: GroupRewards, config: CreditConfig) -> Tensor:
    """REINFORCE with the mean return of the other rollouts as baseline (arXiv 2402.14740), the same for every turn.

    Args:
        rewards: of one group.
        config: leave_one_out, scale and eps are read.

    Returns:
        `float64 [G, K]`, 0 after a rollout's last turn.
    """
    total_G = rewards.total_G
    return _spread((total_G - _baseline(total_G, config)) / _scale(total_G, config), rewards)


def reinforce_pp(rewards: GroupRewards, config: CreditConfig) -> Tensor:
    """REINFORCE++ (arXiv 2501.03262): the return from each turn on, to be whitened over the batch (`scale: batch`).

    Args:
        rewards: of one group, whose rollouts are not compared with each other.
        config: gamma is read.

    Returns:
        `float64 [G, K]`, 0 after a rollout's last turn.
    """
    return to_go(rewards.due_GK, config.gamma) * rewards.alive_GK


RULES: dict[str, Callable[[GroupRewards, CreditConfig], Tensor]] = {
    rule.__name__: rule for rule in (traj_or, traj_mr, mt_grpo, mt_grpo_k, turn_rtg, flat_content, rloo, reinforce_pp)
}


def credit_rule(name: str) -> Callable[[GroupRewards, CreditConfig], Tensor]:
    """The rule that a recipe names.

    Args:
        name: in `RULES`, or `package.module:function`.

    Raises:
        UserError: there is no such rule.
    """
    return RULES[name] if name in RULES else load_function(name, "credit.rule", RULES)


def _spread(value_G: Tensor, rewards: GroupRewards) -> Tensor:
    """One number a rollout, on each turn it took."""
    return value_G[:, None] * rewards.alive_GK


def _normalised(value: Tensor, config: CreditConfig) -> Tensor:
    """Deviation from the mean over the group (first dimension), in standard deviations where `scale` says so."""
    deviation = value - value.mean(0)
    return deviation / (_deviation(value) + config.eps) if config.scale == "group" else deviation


def _baseline(value: Tensor, config: CreditConfig) -> Tensor:
    """Mean over the group, each rollout's own value left out where asked; 0 for a rollout without others."""
    G = value.shape[0]
    if not config.leave_one_out:
        return value.mean(0, keepdim=True)
    return (value.sum(0) - value) / (G - 1) if G > 1 else torch.zeros_like(value)


def _scale(returns: Tensor, config: CreditConfig) -> Tensor | float:
    """The one number that divides a group's advantages: the deviation of its returns, the largest of several turns'."""
    return _deviation(returns).max() + config.eps if config.scale == "group" else 1.0


def _deviation(value: Tensor) -> Tensor:
    """Unbiased standard deviation over the group; 0 for a single rollout."""
    return value.std(0) if value.shape[0] > 1 else torch.zeros_like(value[0])
