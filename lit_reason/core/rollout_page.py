"""What a run's page says of rollouts: credit by turn over time, and turns coloured by their credit."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path

from lit_reason.core.metrics_log import MetricsLog
from lit_reason.core.plots import COLOURS, Curve, Figure, line_plot
from lit_reason.core.report import Passage, Piece, Scale, Section, clip
from lit_reason.rollout.trajectory import NOT_SAMPLED, Trajectory

MOST_READ = 8 * 2**20  # bytes of the ledger that are read, from its end
LONGEST = 1500  # characters of a stretch that are shown
TERM = "train/paid/"  # before the name of a reward


def credit_section(log: MetricsLog) -> Section:
    """Rewards, and how their credit lies over turns, as plots over steps.

    Args:
        log: the run's metrics; whatever is missing in it leaves its plot out.
    """
    shown = (("train/reward", "all", "c1"), ("train/turn_reward", "of turns", "c3"), ("train/outcome", "outcome", "c4"))
    rewards = [Curve(label, log.points(name), colour, smooth=True) for name, label, colour in shown]
    rewards.append(Curve("held-out", log.points("val/reward"), "c2", markers=True))
    dead = [
        Curve("without spread", log.points("train/dead_groups"), "c2", smooth=True),
        Curve("replaced", log.points("train/resampled"), "c1", smooth=True),
    ]
    figures = (
        line_plot("Reward of a rollout", rewards),
        _terms_plot(log),
        line_plot(
            "Variance of the advantage",
            _by_turn(log, "variance"),
            note="Over rollouts that reached the turn. A turn without any teaches nothing.",
            from_zero=True,
        ),
        line_plot(
            "Share of the gradient",
            _by_turn(log, "gradient"),
            note="Of the absolute gradient at the logits, before the round's first update.",
            percent=True,
        ),
        line_plot("Groups that teach nothing", dead, note="Their rollouts all earned the same.", percent=True),
    )
    return Section("Reward and credit", figures=[figure for figure in figures if figure])


def _terms_plot(log: MetricsLog) -> Figure | None:
    """Rewards by name; none where there is but one."""
    names = [name for name in log.series if name.startswith(TERM)]
    if len(names) < 2:
        return None
    largest = sorted(names, key=lambda name: -max(abs(value) for _, value in log.points(name)))[: len(COLOURS)]
    curves = [
        Curve(name.removeprefix(TERM), log.points(name), colour, smooth=True)
        for name, colour in zip(sorted(largest), COLOURS, strict=False)
    ]
    hidden = len(names) - len(curves)
    note = f"{hidden} smaller ones are under All metrics." if hidden else "A rollout's mean, weights included."
    return line_plot("Rewards by name", curves, note=note)


def _by_turn(log: MetricsLog, figure: str) -> list[Curve]:
    names = {k: f"credit/{figure}_turn_{k}" for k in range(1, len(COLOURS) + 1)}
    return [Curve(f"turn {k}", log.points(name), COLOURS[k - 1], smooth=True) for k, name in names.items()]


def rollout_section(ledger: Path, decode: Callable[[Sequence[int]], str], most: int = 6) -> Section:
    """The newest recorded round: of some tasks the rollouts with the highest and the lowest reward.

    Args:
        ledger: `rollouts.jsonl` of the run; may be missing.
        decode: turns token ids into text.
        most: rollouts to show.
    """
    groups = defaultdict(list)
    for t in newest_round(ledger):
        groups[t.prompt].append(t)
    by_spread = sorted(groups.values(), key=lambda group: min(map(_total, group)) - max(map(_total, group)))
    pairs = [(max(g, key=_total), min(g, key=_total)) if len(g) > 1 else (g[0],) for g in by_spread]
    chosen = [t for pair in pairs for t in pair][:most]
    if not chosen:
        return Section("Rollouts")
    reach = max((abs(credit) for t in chosen for credit in _credits(t).values()), default=0.0) or 1.0
    note = (
        f"Recorded after {chosen[0].policy_version:,} updates: of the tasks whose rollouts differ most, the best and "
        "the worst. A turn's colour is its credit, the mean advantage of its tokens. Grey was not written by the model."
    )
    scale = Scale(f"{-reach:+.2f}", "no credit", f"{reach:+.2f}")
    return Section("Rollouts", note, passages=[_passage(t, decode, reach) for t in chosen], scale=scale)


def newest_round(ledger: Path) -> list[Trajectory]:
    """Rollouts of the last recorded round that were played and did not fail; as many as lie near the end of the file.

    Args:
        ledger: the file; may be missing.
    """
    if not ledger.is_file():
        return []
    with ledger.open("rb") as file:
        start = max(ledger.stat().st_size - MOST_READ, 0)
        file.seek(start)
        lines = file.read().splitlines()[1 if start else 0 :]
    found = [Trajectory(**json.loads(line)) for line in lines]
    return [t for t in found if t.policy_version == found[-1].policy_version and t.ids and not t.failure]


def _total(t: Trajectory) -> float:
    return sum(t.turn_rewards) + t.outcome


def _credits(t: Trajectory) -> dict[int, float]:
    """Mean advantage of the tokens of each turn."""
    found = defaultdict(list)
    for k, advantage in zip(t.turn_id, t.advantage, strict=False):
        if k != NOT_SAMPLED:
            found[k].append(advantage)
    return {k: sum(values) / len(values) for k, values in found.items()}


def _passage(t: Trajectory, decode: Callable[[Sequence[int]], str], reach: float) -> Passage:
    worth, pieces, at = _credits(t), [], 0
    for k, run in groupby(t.turn_id):
        n = len(list(run))
        text = clip(decode(t.ids[at : at + n]), LONGEST)
        if k == NOT_SAMPLED:
            pieces.append(Piece(text, f"{'environment' if at else 'prompt'} · {n:,}", size=n, faint=True))
        else:
            credit = worth.get(k, 0.0)
            said = ", ".join(f"{name} {value:g}" for name, value in t.turn_terms[k].items() if value)
            label = " · ".join([f"turn {k + 1}", f"{n:,}", f"credit {credit:+.2f}", *([said] if said else [])])
            colour = "above" if credit > 0 else "below"
            pieces.append(Piece(text, label, colour, n, strength=min(abs(credit) / reach, 1.0)))
        at += n
    ended = "" if t.finished else "cut off"
    outcome = ", ".join(f"{name} {value:g}" for name, value in t.outcome_terms.items())
    return Passage(
        f"{t.row_id}, rollout {t.rollout}",
        [fact for fact in (f"reward {_total(t):g}", outcome, ended, f"{t.sampled:,} tokens sampled") if fact],
        pieces,
    )
