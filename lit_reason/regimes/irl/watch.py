"""Does the reward learn substance or style? Figures of a reward on pairs, as arithmetic on numbers.

Shape letters: N pairs. A margin is the score of the demonstration less that of the policy's answer.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

FIGURES = (
    *("reward_loss", "pair_accuracy", "margin", "resting", "round"),
    *("identical", "repeated_pairs", "unfinished", "answer_tokens", "demonstration_tokens"),
    *("kl_previous", "kl_initial", "round_kl", "expert_logp"),
    *("reward_mean", "reward_std", "contraction", "length_correlation", "length_accuracy", "end_share", "drift"),
    *("ended_reward", "endless_reward"),
)


def accuracy(margin_N: Tensor) -> Tensor:
    """Whether each pair is told apart rightly; a tie is half right. `float [N]`.

    Args:
        margin_N: margins.
    """
    return (margin_N > 0).float() + 0.5 * (margin_N == 0).float()


def correlation(a: Tensor, b: Tensor) -> float:
    """Pearson's correlation; 0 where one of the two does not vary.

    Args:
        a: numbers.
        b: as many.
    """
    a, b = a.double() - a.double().mean(), b.double() - b.double().mean()
    scale = (a.norm() * b.norm()).item()
    return float(a @ b) / scale if scale > 0 else 0.0


def style(margin_N: Tensor, tokens_N2: Tensor, endless_N: Tensor) -> dict[str, float]:
    """How much of a reward's margins style explains.

    Args:
        margin_N: margins.
        tokens_N2: tokens of demonstration and answer.
        endless_N: margins of the same pairs without end tokens.

    Returns:
        `length_correlation` of margin and difference in length; `length_accuracy`, how well the better of the two rules
        "longer" and "shorter" tells the pairs apart; `end_share`, the part of the mean margin that goes with the end
        tokens (1: all of it).
    """
    gap_N = (tokens_N2[:, 0] - tokens_N2[:, 1]).float()
    longer = float(accuracy(gap_N).mean())
    moved, whole = float((margin_N - endless_N).mean()), float(margin_N.mean())
    return {
        "length_correlation": correlation(margin_N, gap_N),
        "length_accuracy": max(longer, 1 - longer),
        "end_share": moved / whole if abs(whole) > 1e-6 else 0.0,
    }


def endings(scores: Sequence[float], finished: Sequence[bool], no_end: float | None) -> dict[str, float]:
    """What answers that ended earn on average, beside what is paid for one that never does.

    Args:
        scores: normalised, one an answer.
        finished: whether it ended.
        no_end: what an answer without end is paid; None pays its score.

    Returns:
        Both; nothing where none ended, or an answer without end earns its score.
    """
    ended = [score for score, whole in zip(scores, finished, strict=True) if whole]
    if not ended or no_end is None:
        return {}
    return {"ended_reward": sum(ended) / len(ended), "endless_reward": no_end}


def contraction(beta: float) -> float:
    """By what `log(pi / expert)` is multiplied in a round in which both levels are solved, `|1 - 1/beta|`.

    For a Bradley-Terry reward and a divergence to the round's start: the optimal reward is `log(expert / pi)`, so the
    next policy is `pi^(1 - 1/beta) expert^(1/beta)`. Above 1 only unfinished levels keep the loop from diverging.

    Args:
        beta: weight of the divergence, in units of the reward as it was fitted, before it was normalised.
    """
    return abs(1 - 1 / beta)


def falling(held_out: Sequence[float], drop: float) -> bool:
    """Whether the last of some accuracies is further below the best of them than allowed.

    Args:
        held_out: accuracies, in order.
        drop: how far is allowed.
    """
    return bool(held_out) and held_out[-1] < max(held_out) - drop
