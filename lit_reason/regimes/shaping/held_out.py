"""The objective of the outer problem: the unshaped score on held-out prompts, less the divergence it cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, variance
from typing import Any

from lit_reason.core.ranks import from_all_ranks
from lit_reason.errors import UserError

FIRST_SEED = 7_000_003  # apart from the seeds of rounds


@dataclass(frozen=True)
class Answered:
    """What the answers to one held-out prompt came to, as means over its rollouts.

    Attributes:
        score: unshaped reward.
        kl: divergence from the policy before training, in nats an answer.
        length: tokens of an answer.
    """

    score: float
    kl: float
    length: float


def halves(tasks: Sequence[Any], part: str) -> Sequence[Any]:
    """The tasks that the search maximises on, or those it never sees.

    Args:
        tasks: held-out tasks.
        part: `validation` the first half, `test` the second.

    Raises:
        UserError: there are fewer than two.
    """
    if len(tasks) < 2:
        raise UserError(
            f"search: data.val_count gives {len(tasks)} held-out tasks; at least 2 are needed, some to maximise on and "
            "others to test the final run on"
        )
    half = len(tasks) // 2
    return tasks[:half] if part == "validation" else tasks[half:]


def objective(own: Sequence[Answered], kl_weight: float) -> dict[str, float]:
    """Mean and squared standard error over prompts, of all processes.

    Args:
        own: answers of this process; may be none.
        kl_weight: what a nat costs.

    Returns:
        `objective`, its `variance`, and the means `score`, `kl` and `length`.
    """
    everyone = [a for part in from_all_ranks(list(own)) for a in part]
    values = [a.score - kl_weight * a.kl for a in everyone]
    spread = variance(values) / len(values) if len(values) > 1 else 0.0
    means = {name: fmean(getattr(a, name) for a in everyone) for name in ("score", "kl", "length")}
    return {"objective": fmean(values), "variance": spread, **means}


def by_prompt(prompts: Sequence[int], figures: Mapping[str, Sequence[float]]) -> list[Answered]:
    """Means over the rollouts of each prompt: rollouts of one prompt are no independent observations.

    Args:
        prompts: number of each rollout's prompt.
        figures: `score`, `kl` and `length` of each rollout.
    """
    found = []
    for prompt in sorted(set(prompts)):
        at = [i for i, p in enumerate(prompts) if p == prompt]
        found.append(Answered(**{name: fmean(values[i] for i in at) for name, values in figures.items()}))
    return found
