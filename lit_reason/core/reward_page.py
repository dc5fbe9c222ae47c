"""The page's part on a learned reward: does it learn substance or style, and what to do about it."""

from __future__ import annotations

import itertools

from lit_reason.core.metrics_log import MetricsLog
from lit_reason.core.plots import Curve, Figure, line_plot
from lit_reason.core.report import Section, Table

SUSPECT = 0.9  # accuracy of a rule, or share of a margin, from which on style is likely
ALARMS: dict[str, str] = {
    "style": "The reward tells its own pairs apart ({train:.0%}) but not held-out ones{kind} ({held:.0%}): it learnt "
    "style. Lower reward.stop_accuracy, give the reward fewer steps, or make answers look like demonstrations.",
    "falls": "Accuracy on held-out pairs fell from {best:.0%} to {held:.0%}: later rounds teach the reward something "
    "else. Set reward.check_every and reward.stop_drop, or replay earlier pairs (reward.replay: all).",
    "length": "Length alone tells {length:.0%} of the pairs apart (correlation with the margin {corr:+.2f}): the "
    "reward may be counting tokens. Bring sampling.max_new_tokens near the demonstrations' length.",
    "end": "{end:.0%} of the margin goes with the end token: the reward detects who stopped. Give answers room to end "
    "(sampling.max_new_tokens), or set rounds.unfinished: drop.",
    "endless": "Answers that end earn {ended:.1f} on average, those that never do {endless:.1f}: the policy learns not "
    "to end. Give answers room to end (sampling.max_new_tokens), or lower rounds.no_end_reward.",
    "identical": "{same:.0%} of the answers equal the demonstration; those pairs teach nothing. Sample at a higher "
    "temperature, or stop: the policy may have learnt all there is.",
    "drift": "Scores of fixed texts moved by {drift:.1f} deviations in a round: each round learns another reward. Set "
    "reward.start: warm, replay all rounds, or lower reward.lr.",
    "far": "The policy moved {moved:.1f} nats a response in one round, {total:.1f} from its start. Set "
    "rounds.max_round_kl, raise policy.kl, or hold it to the start of the run (rounds.kl_reference: initial).",
}
NO_BETTER = 0.55  # accuracy on held-out pairs below which a reward knows nothing of them
KINDS = ("c2", "c3", "c4", "c5")  # colours of kinds of held-out pairs
BANDS = "Bands are 95 % Wilson intervals."
HELD_OUT = "val/pair_accuracy/"  # and the kind of the pairs
FAR = 20.0  # nats a response
DRIFT = 1.0  # deviations


def kinds(log: MetricsLog) -> list[str]:
    """Kinds of held-out pairs, where the run told them apart.

    Args:
        log: the run's metrics.
    """
    return sorted(name.removeprefix(HELD_OUT) for name in log.series if name.startswith(HELD_OUT))


def reward_alarms(log: MetricsLog) -> list[str]:
    """What is likely wrong with a learned reward, and what to try.

    Args:
        log: the run's metrics; without a learned reward there is nothing to say.
    """
    last = {name: log.last(f"train/{name}") for name in _FIGURES}
    held = [value for _, value in log.points("val/pair_accuracy")]
    found = []

    def alarm(name: str, **figures: float | str) -> None:
        found.append(ALARMS[name].format(**figures))

    train = last["pair_accuracy"]
    by_kind = [(log.last(HELD_OUT + kind) or 0.0, f" of the kind '{kind}'") for kind in kinds(log)]
    if train is not None and held and train > SUSPECT:
        worst, kind = min([(held[-1], ""), *by_kind])
        if worst < NO_BETTER:
            alarm("style", train=train, held=worst, kind=kind)
    if len(held) > 1 and held[-1] < max(held) - 0.05:
        alarm("falls", best=max(held), held=held[-1])
    length, corr = last["length_accuracy"], last["length_correlation"]
    if length is not None and corr is not None and length > SUSPECT and abs(corr) > 0.5:
        alarm("length", length=length, corr=corr)
    if (end := last["end_share"]) is not None and end > 0.5:
        alarm("end", end=min(end, 1.0))
    ended, endless = log.last("train/ended_reward"), log.last("train/endless_reward")
    if ended is not None and endless is not None and ended < endless:
        alarm("endless", ended=ended, endless=endless)
    if (same := last["identical"]) is not None and same > 0.2:
        alarm("identical", same=same)
    if (drift := last["drift"]) is not None and drift > DRIFT:
        alarm("drift", drift=drift)
    moved = [value for _, value in log.points("train/kl_previous")]
    if moved and max(moved) > FAR:
        alarm("far", moved=max(moved), total=last["kl_initial"] or max(moved))
    return found


_FIGURES = (
    *("pair_accuracy", "length_accuracy", "length_correlation", "end_share", "identical", "drift", "kl_initial"),
    *("reward_mean", "reward_std", "kl_previous", "expert_logp", "unfinished", "contraction"),
)


def reward_section(log: MetricsLog) -> Section:
    """Plots of the reward and of the rounds; empty without a learned reward.

    Args:
        log: the run's metrics.
    """
    if not log.points("train/pair_accuracy"):
        return Section("Learned reward")
    return Section(
        "Learned reward",
        "Its own pairs are a demonstration and the policy's answer. A reward that tells those apart and not the "
        "held-out ones, in which one answer is known to be better, has learnt style, not substance.",
        figures=[figure for figure in _figures(log) if figure is not None],
        tables=_by_round(log),
    )


def _figures(log: MetricsLog) -> list[Figure | None]:
    told = [
        Curve("its own pairs", log.points("train/pair_accuracy"), "c1", smooth=True),
        *(_held_out(log, f"/{kind}", colour) for kind, colour in zip(kinds(log), itertools.cycle(KINDS))),
        Curve("by length alone, its own pairs", log.points("train/length_accuracy"), "c8", markers=True, dashed=True),
    ]
    if not kinds(log):
        told.insert(1, _held_out(log, "", KINDS[0]))
    leaks = [
        Curve("correlation with length", log.points("train/length_correlation"), "c4", markers=True),
        Curve("share of the end token", log.points("train/end_share"), "c5", markers=True),
        Curve("drift of fixed texts, deviations", log.points("train/drift"), "c6", markers=True),
    ]
    moved = [
        Curve("from the start of the round before", log.points("train/kl_previous"), "c1", markers=True),
        Curve("from the start of the run", log.points("train/kl_initial"), "c2", markers=True),
    ]
    scale = [
        Curve("deviation on demonstrations", log.points("train/reward_std"), "c3", markers=True),
        Curve("mean on demonstrations", log.points("train/reward_mean"), "c8", markers=True, dashed=True),
    ]
    likely = Curve("log-likelihood", log.points("train/expert_logp"), "c1", markers=True)
    note = "Dots come once a round."
    return [
        line_plot("Pairs told apart", told, percent=True, note=BANDS if log.points("val/pair_accuracy") else ""),
        line_plot("Signs of style", leaks, note=note),
        line_plot("How far the policy moved", moved, unit="nats a response", from_zero=True, note=note),
        line_plot("Scale of the reward", scale, note=note),
        line_plot("Likelihood of demonstrations", [likely], unit="nats a response", note=note),
    ]


def _held_out(log: MetricsLog, ending: str, colour: str) -> Curve:
    held = log.points(f"val/pair_accuracy{ending}")
    ends = [dict(log.points(f"val/pair_accuracy_{end}{ending}")) for end in ("low", "high")]
    band = [(step, ends[0][step], ends[1][step]) for step, _ in held if step in ends[0] and step in ends[1]]
    name = f"held-out pairs: {ending[1:]}" if ending else "held-out pairs"
    return Curve(name, held, colour, markers=True, band=band)


def _by_round(log: MetricsLog) -> list[Table]:
    names = [name for name in _FIGURES if name != "pair_accuracy" and log.points(f"train/{name}")]
    number = max((len(log.points(f"train/{name}")) for name in names), default=0)
    if not number:
        return []
    late = {"drift", "kl_previous"}  # known from the second round on
    rows = []
    for name in names:
        values = [f"{value:.3g}" for _, value in log.points(f"train/{name}")]
        rows.append((name, *([None] * (number - len(values)) if name in late else []), *values))
    width = number + 1
    return [Table(("by round", *map(str, range(number))), [(*row, *[None] * (width - len(row))) for row in rows])]
