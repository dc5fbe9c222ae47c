"""What a recipe may say about shaping and the search for its weights. No torch import: the command line reads it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lit_reason.errors import UserError
from lit_reason.rewards.attribution.config import check_explainers


@dataclass(frozen=True)
class ShapingConfig:
    """How the reward of a response is paid to its tokens.

    Args:
        explainers: what spreads the reward: `final`, `uniform`, `attention`, `prefix`, `shap`, `lime`, `owen`.
        weights: of the explainers, on the simplex; null: equal ones, or what `search` finds.
        credit: `to_go` credits a token with what is paid from it on, which is biased where an explainer looks at later
            tokens (all but `final` and `prefix`); `return` credits every token with all of it: unbiased, and the same
            whatever the weights.
    """

    explainers: tuple[str, ...] = ("final", "shap")
    weights: tuple[float, ...] | None = None
    credit: Literal["to_go", "return"] = "to_go"

    def __post_init__(self) -> None:
        object.__setattr__(self, "explainers", tuple(self.explainers))
        check_explainers(self.explainers)
        if self.weights is None:
            return
        object.__setattr__(self, "weights", tuple(self.weights))
        if len(self.weights) != len(self.explainers):
            raise UserError(
                f"shaping.weights has {len(self.weights)} numbers for {len(self.explainers)} explainers "
                f"({', '.join(self.explainers)})"
            )
        if min(self.weights) < 0 or abs(sum(self.weights) - 1) > 1e-6:
            raise UserError(
                f"shaping.weights {list(self.weights)} sum to {sum(self.weights):g}; they must not be negative and "
                "must sum to 1, or the shaped reward would not sum to the reward"
            )


@dataclass(frozen=True)
class SearchConfig:
    """The outer problem: weights whose inner run ends with the highest unshaped score on held-out prompts.

    The first half of the data module's validation tasks is what the search maximises on, the second half is for the
    test of the final run.

    Args:
        trials: inner runs of the search; how many there were in the paper was not found.
        initial: of these, runs at points fixed beforehand: the vertices `final` and `uniform` where they are among the
            explainers, then Sobol points.
        rounds: rounds of rollouts of an inner run.
        final_rounds: rounds of the run at the end, from the initial policy, with the weights found.
        reruns: inner runs that repeat the best points with other seeds.
        propose: where the trials after the initial ones come from: `bayes` (a Gaussian process and its noisy expected
            improvement, extra `shaping`), or `random` points, the control.
        start: `restart` every inner run from the initial policy, or `continue` from where the last one ended.
        kl: weight of the divergence from the policy before training in the objective.
        eval_group: rollouts a held-out prompt.
        stop_early: share of an inner run's rounds from which on it is stopped when its mean score is below the median
            of the earlier ones; null: never.
        store: file of the trials (SQLite). Processes that are given the same one share the search; default: in the run
            folder.
        lease_s: seconds after which a trial of which nothing was heard is given to another process.
        seed: of the points.
    """

    trials: int = 12
    initial: int = 5
    rounds: int = 20
    final_rounds: int = 100
    reruns: int = 2
    propose: Literal["bayes", "random"] = "bayes"
    start: Literal["restart", "continue"] = "restart"
    kl: float = 0.0
    eval_group: int = 1
    stop_early: float | None = 0.5
    store: str | None = None
    lease_s: float = 600.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("trials", 1), ("initial", 1), ("rounds", 1), ("final_rounds", 1), ("reruns", 0)):
            if getattr(self, name) < least:
                raise UserError(f"search.{name} is {getattr(self, name)}; it must be at least {least}")
        if self.stop_early is not None and not 0 < self.stop_early <= 1:
            raise UserError(f"search.stop_early is {self.stop_early}; it must be above 0 and at most 1, or null")
        if self.kl < 0 or self.eval_group < 1:
            raise UserError("search.kl must not be negative, and search.eval_group must be at least 1")

    def length(self, kind: str) -> int:
        """Rounds of an inner run.

        Args:
            kind: `search`, `rerun` or `final`.
        """
        return self.final_rounds if kind == "final" else self.rounds
