"""Bias of every credit rule where the policy decides when to stop, exact: expectations over all groups of rollouts.

    python -m benchmarks.credit_bias

After each turn a rollout goes on with probability `GO_ON`, one logit for all turns, up to K turns. Every further turn
pays `PAY` and the outcome depends on the number of turns. All rollouts can be listed, so the gradient of the expected
return by the logit is known, and the expectation of any estimator is a sum over all groups of G rollouts.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.record import record
from lit_reason.credit.group import RULES, CreditConfig
from lit_reason.credit.rewards import GroupRewards
from lit_reason.credit.tokens import bilevel_gae, gae, token_rewards

GO_ON, PAY, GROUP = 0.5, 1.0, 2
TURNS = (2, 3, 4, 6)
PLAIN = CreditConfig(scale="none")
Estimator = Callable[[Sequence["Rollout"]], Tensor]


@dataclass(frozen=True)
class Rollout:
    """One way the process can go.

    Attributes:
        chance: its probability.
        turns: reward of each turn.
        outcome: reward of the whole.
        scores: derivative of each turn's log-probability by the logit.
    """

    chance: float
    turns: list[float]
    outcome: float
    scores: list[float]


def outcome(turns: int) -> float:
    """Reward of a whole rollout of so many turns."""
    return 0.3 * math.sin(2.0 * turns)


def rollouts(most: int) -> list[Rollout]:
    """All of them, of 1 to `most` turns.

    Args:
        most: after this turn there is no choice.
    """
    found = []
    for n in range(1, most + 1):
        stopped = n < most
        chance = GO_ON ** (n - 1) * ((1 - GO_ON) if stopped else 1.0)
        scores = [1 - GO_ON] * (n - 1) + [-GO_ON if stopped else 0.0]
        found.append(Rollout(chance, [0.0] + [PAY] * (n - 1), outcome(n), scores))
    return found


def true_gradient(most: int, outcome_only: bool = False) -> float:
    """Derivative of the expected return by the logit: every turn's score times the whole return.

    Args:
        most: turns.
        outcome_only: of the expected outcome instead.
    """
    return sum(r.chance * sum(r.scores) * (r.outcome + (0.0 if outcome_only else sum(r.turns))) for r in rollouts(most))


def expectation(estimator: Estimator, most: int, size: int = GROUP) -> float:
    """Expected estimate of the gradient, over every group of `size` rollouts.

    Args:
        estimator: advantages `[G, K]` of a group.
        most: turns.
        size: G.
    """
    total = 0.0
    for group in itertools.product(rollouts(most), repeat=size):
        advantage = estimator(group)
        chance = math.prod(r.chance for r in group)
        total += chance * sum(float(advantage[i, k]) * s for i, r in enumerate(group) for k, s in enumerate(r.scores))
    return total / size


def by_rule(name: str, config: CreditConfig = PLAIN) -> Estimator:
    """A rule of `RULES`.

    Args:
        name: its name.
        config: its settings.
    """
    return lambda group: RULES[name](GroupRewards.of([r.turns for r in group], [r.outcome for r in group]), config)


def by_survivors(group: Sequence[Rollout]) -> Tensor:
    """The naive extension: each turn's reward against the mean of those rollouts alone that reached the turn."""
    rewards = GroupRewards.of([r.turns for r in group], [r.outcome for r in group])
    alive = rewards.alive_GK
    mean = (rewards.due_GK * alive).sum(0) / alive.sum(0).clamp(min=1)
    return (rewards.due_GK - mean) * alive


def by_critic(advantages: Callable[..., Tensor], value: Callable[[int], float], lam: float) -> Estimator:
    """A rule with a critic; a turn has two tokens, the second of which decides, and one of the environment follows.

    Args:
        advantages: `gae` or `bilevel_gae`.
        value: of the state in which turn k is decided.
        lam: of the trace.
    """

    def one(r: Rollout) -> Tensor:
        n = len(r.turns)
        turn_id = torch.tensor([i for k in range(n) for i in (k, k, -1)])
        values = torch.tensor([v for k in range(n) for v in (value(k), value(k), 9.0)], dtype=torch.float64)
        due = GroupRewards.of([r.turns], [r.outcome]).due_GK[0]
        between = {"turn_lam": lam} if advantages is bilevel_gae else {}
        return advantages(token_rewards(due, turn_id), values, turn_id, lam=lam, **between)[1::3]

    return lambda group: torch.nn.utils.rnn.pad_sequence([one(r) for r in group], batch_first=True)


def exact_value(most: int) -> Callable[[int], float]:
    """What can be expected from turn k on, its own reward included, which is due whatever is decided.

    Args:
        most: turns.
    """

    def value(k: int) -> float:
        stop = outcome(k + 1)
        own = PAY if k else 0.0
        return own + (stop if k + 1 == most else (1 - GO_ON) * stop + GO_ON * value(k + 1))

    return value


def guess(k: int) -> float:
    """A critic that is wrong."""
    return 0.7 - 0.4 * k


def estimators(most: int) -> Iterator[tuple[str, Estimator]]:
    """All that are compared, by name.

    Args:
        most: turns.
    """
    for name in RULES:
        yield name, by_rule(name)
    for name in ("gae", "bilevel_gae"):
        rule = {"gae": gae, "bilevel_gae": bilevel_gae}[name]
        yield f"{name}, any critic, lambda 1", by_critic(rule, guess, 1.0)
        yield f"{name}, exact critic, lambda 0", by_critic(rule, exact_value(most), 0.0)
        yield f"{name}, wrong critic, lambda 0", by_critic(rule, guess, 0.0)
    yield "turn_rtg, own rollout in the baseline", by_rule("turn_rtg", CreditConfig(scale="none", leave_one_out=False))
    yield "turn_rtg, divided by the group's deviation", by_rule("turn_rtg", CreditConfig())
    yield "survivors alone (not offered)", by_survivors


def main() -> None:
    """Print the table and write it down."""
    truth = {most: true_gradient(most) for most in TURNS}
    rows = {
        name: {most: expectation(dict(estimators(most))[name], most) for most in TURNS} for name, _ in estimators(2)
    }
    print("| estimator | " + " | ".join(f"K = {most}" for most in TURNS) + " |\n|---|" + "---|" * len(TURNS))
    print("| true gradient | " + " | ".join(f"{truth[most]:.4f}" for most in TURNS) + " |")
    for name, found in rows.items():
        print(f"| {name} | " + " | ".join(f"{found[most]:.4f}" for most in TURNS) + " |")
    result = {"go_on": GO_ON, "pay": PAY, "group": GROUP, "true": truth, "expected": rows}
    print(record("credit_bias", result, command="python -m benchmarks.credit_bias"))


if __name__ == "__main__":
    main()
