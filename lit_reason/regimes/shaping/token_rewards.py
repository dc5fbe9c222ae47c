"""From rollouts to rollouts with a reward at every token.

Shape letters: K explainers, T tokens of a response.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from lit_reason.envs.environment import Environment
from lit_reason.errors import UserError
from lit_reason.regimes.shaping.config import ShapingConfig
from lit_reason.regimes.shaping.environment_reward import EnvironmentReward
from lit_reason.rewards.attribution.attributor import Attributor, Explanation
from lit_reason.rewards.attribution.config import AttributionConfig
from lit_reason.rewards.attribution.token_credit import mixed
from lit_reason.rewards.composition import Rewards
from lit_reason.rewards.sequence_reward import SequenceReward
from lit_reason.rollout.trajectory import NOT_SAMPLED, Trajectory

FIGURES = ("score", "reward_calls", "known", "timed_out", "base_score")
SHOWN = 12  # answers kept for the report
Decode = Callable[[Sequence[int]], str]


def answer(trajectory: Trajectory) -> tuple[int, int]:
    """Where the sampled answer begins and ends.

    Args:
        trajectory: of one turn.

    Raises:
        UserError: it has several turns.
    """
    if len(trajectory.stops) > 1:
        raise UserError(
            f"shaping explains answers of one turn, and a rollout has {len(trajectory.stops)}: "
            "set dialogue.max_turns to 0, or take GRPORegime with rewards by turn"
        )
    at = [i for i, turn in enumerate(trajectory.turn_id) if turn != NOT_SAMPLED]
    return (at[0], at[-1] + 1) if at else (len(trajectory.ids), len(trajectory.ids))


class TokenRewards:
    """Pays the tokens of a round's answers.

    Args:
        shaping: explainers, and how tokens are credited.
        attribution: how the explainers work.
        reward: of whole answers; None: what the environment pays.

    Attributes:
        tasks: what the rollouts answer, by `Trajectory.prompt`; set before each round.
        shown: the newest answers with their explanations, for the report.
    """

    def __init__(
        self, shaping: ShapingConfig, attribution: AttributionConfig, reward: SequenceReward | None = None
    ) -> None:
        self.shaping, self.attribution, self.reward = shaping, attribution, reward
        self.tasks: Sequence[Mapping[str, Any]] = ()
        self.shown: list[tuple[Trajectory, Explanation]] = []
        self._attributor: Attributor | None = None

    def open(
        self,
        env: Callable[[], Environment],
        rewards: Rewards,
        decode: Decode,
        stop_ids: Collection[int],
        seed: int,
    ) -> None:
        """Get ready for rollouts.

        Args:
            env: makes the environment, which is the reward where there is no other.
            rewards: what is paid for what in it.
            decode: ids to text.
            stop_ids: tokens that end an answer.
            seed: of the explainers' draws.
        """
        self.reward = self.reward or EnvironmentReward(env, rewards, decode, stop_ids)
        self.reward.load()
        names = self.shaping.explainers
        self._attributor = Attributor(names, self.attribution, seed=seed, always=stop_ids, decode=decode)

    def pay(self, rollouts: Sequence[Trajectory], weights: Sequence[float]) -> tuple[list[Trajectory], dict[str, list]]:
        """Rollouts with the reward of the answer as their outcome, and its shares at the tokens.

        Args:
            rollouts: of one turn each; those whose environment failed are left as they are.
            weights: of the explainers, on the simplex.

        Returns:
            As many rollouts, and figures by name: `score` of each answer, `reward_calls` it cost, whether it was known
            (`known`) or given up (`timed_out`), and its worth when all of it is masked (`base_score`).
        """
        found, shown = [], []
        figures: dict[str, list] = {name: [] for name in FIGURES}
        for i, t in enumerate(rollouts):
            if t.failure or not t.ids:
                found.append(t)
                continue
            e = self._explain(rollouts, i)
            found.append(self._paid(t, e, weights))
            shown.append((t, e))
            figures["score"].append(e.reward)
            figures["reward_calls"].append(float(e.calls))
            figures["known"].append(float(e.cached))
            figures["timed_out"].append(float(e.timed_out))
            figures["base_score"] += [] if e.base is None else [e.base]
        self.shown = shown[:SHOWN]
        return found, figures

    def scores(self, rollouts: Sequence[Trajectory], tasks: Sequence[Mapping[str, Any]]) -> list[float]:
        """Unshaped reward of each answer, without a word on its tokens.

        Args:
            rollouts: of one turn each.
            tasks: what they answer.
        """
        return [self._score(t, tasks[t.prompt]) for t in rollouts]

    def _score(self, t: Trajectory, task: Mapping[str, Any]) -> float:
        ids_1L = torch.tensor([t.ids])
        return float(self._reward.for_task(task, answer(t)[0])(ids_1L, torch.ones_like(ids_1L, dtype=torch.bool)))

    @property
    def _reward(self) -> SequenceReward:
        assert self.reward is not None, "open first"
        return self.reward

    def _explain(self, rollouts: Sequence[Trajectory], i: int) -> Explanation:
        assert self._attributor is not None, "open first"
        t = rollouts[i]
        start, stop = answer(t)
        reward = self._reward.for_task(self.tasks[t.prompt], start)
        other = _another(rollouts, i) if self.attribution.masking == "reference" else None
        return self._attributor.explain(reward, t.ids[:start], t.ids[start:stop], other)

    def _paid(self, t: Trajectory, e: Explanation, weights: Sequence[float]) -> Trajectory:
        start, stop = answer(t)
        paid_T = [0.0] * len(t.ids)
        if stop > start:
            paid_T[start:stop] = mixed(torch.tensor(weights, dtype=torch.float64), e.credit_KT).tolist()
            if self.shaping.credit == "return":  # all of it at the last token, from where it reaches every other
                paid_T[start:stop] = [*[0.0] * (stop - start - 1), sum(paid_T)]
        return replace(t, turn_terms=[{}] * len(t.turn_terms), outcome_terms={"score": e.reward}, token_rewards=paid_T)


def _another(rollouts: Sequence[Trajectory], i: int) -> list[int]:
    """The answer of the next rollout of the same prompt, which may stand in for masked tokens."""
    group = [j for j, t in enumerate(rollouts) if t.prompt == rollouts[i].prompt and not t.failure]
    other = rollouts[group[(group.index(i) + 1) % len(group)]]
    start, stop = answer(other)
    return other.ids[start:stop]
