"""From a run's numbers and facts to its page."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from lit_reason.core.metrics_log import MetricsLog, Points
from lit_reason.core.plots import Curve, Figure, bar_plot, line_plot
from lit_reason.core.report import (
    Interval,
    ReportData,
    Sample,
    Section,
    Table,
    Tile,
    count,
    duration,
    share,
)
from lit_reason.core.reward_page import reward_alarms, reward_section
from lit_reason.core.rollout_page import credit_section
from lit_reason.core.unlearning_page import unlearning_section
from lit_reason.data.condensation.ledger import PARTS
from lit_reason.data.token_row import SEGMENT_NAMES

SEGMENT_COLOURS = dict(zip(SEGMENT_NAMES, ("c8", "c8", "c1", "c5", "c3", "c2", "c4", "c7", "c6", "c1"), strict=True))
INTERVAL_NOTE = "the band is the 95 % Wilson interval"


@dataclass(frozen=True)
class RunFacts:
    """What the metrics do not say about a run.

    Attributes:
        title: name of the run.
        method: what kind of training.
        model: what was trained.
        status: see `ReportData.status`.
        alarm: what went wrong.
        problems: held-out problems behind the last accuracy; None when unknown.
        ledger: what data preparation counted: `rows`, `bad_rows`, `dropped`, `condensation`, `notes`.
        samples: newest answers to held-out prompts.
        rollouts: newest recorded rollouts.
        own: parts of the page that the regime adds.
        config: the recipe as it was run, YAML.
        command: the command line.
        versions: packages and machine.
        written: when, for the footer.
    """

    title: str
    method: str = ""
    model: str = ""
    status: str = "finished"
    alarm: str = ""
    problems: int | None = None
    ledger: Mapping[str, Any] = field(default_factory=dict)
    samples: Sequence[Sample] = ()
    rollouts: Section = Section("Rollouts")  # noqa: RUF009 (frozen)
    own: Sequence[Section] = ()
    config: str = ""
    command: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    written: str = ""


def run_page(facts: RunFacts, log: MetricsLog) -> ReportData:
    """The page of one run.

    Args:
        facts: what the metrics do not say.
        log: the run's metrics; whatever is missing in it leaves its tile, plot or sentence out.
    """
    alarms = [facts.alarm] if facts.alarm else []
    alarms += [f"{name} was NaN or infinite, first at step {step}" for name, step in log.broken.items()]
    alarms += reward_alarms(log)
    return ReportData(
        title=facts.title,
        kicker=[part for part in (facts.method, facts.model, f"{log.steps:,} optimizer steps") if part],
        status=facts.status,
        verdict=_verdict(facts, log),
        alarm="\n".join(alarms),
        tiles=_tiles(facts, log),
        sections=[
            Section("Answers to held-out problems", figures=_accuracy_plots(log)),
            Section("Loss", figures=_loss_plots(log)),
            unlearning_section(log),
            reward_section(log),
            Section("Tokens by part of the trace", figures=_segment_plots(log)),
            Section("Restarts", figures=_restart_plots(log)),
            credit_section(log),
            *facts.own,
            facts.rollouts,
            _samples(facts.samples),
            _data(facts.ledger),
            Section("Speed and memory", figures=_speed_plots(log)),
            Section("All metrics", tables=_all_metrics(log), folded=True),
            Section("Recipe", text=facts.config, folded=True),
            _machine(facts),
        ],
        footer=facts.written,
    )


# ---- top of the page ------------------------------------------------------------------------------------------


def accuracy(log: MetricsLog, at: int = -1) -> Interval | None:
    """Share of held-out problems that were solved, `val/pass@1`, with its interval.

    Args:
        log: the run's metrics.
        at: which evaluation: -1 the newest, 0 the first.
    """
    points = log.points("val/pass@1")
    if not points:
        return None
    step, value = points[at]
    low, high = (dict(log.points(f"val/pass@1_{end}")).get(step, value) for end in ("low", "high"))
    return Interval(value, low, high)


def _verdict(facts: RunFacts, log: MetricsLog) -> str:
    trained, seconds = log.last("perf/total_trained_tokens"), log.last("perf/total_seconds")
    parts = [f"{log.steps:,} optimizer step{'s' if log.steps != 1 else ''}"]
    if trained is not None:
        parts.append(f"on {count(trained)} trained tokens")
    if seconds is not None:
        parts.append(f"in {duration(seconds)}")
    subject = " ".join(
        part for part in (facts.method, "of" if facts.method and facts.model else "", facts.model) if part
    )
    sentences = [f"{subject}: {' '.join(parts)}." if subject else f"{' '.join(parts)}."]
    loss = log.points("train/loss")
    if len(loss) > 1:
        few = min(5, len(loss) // 40 + 1)
        first, last = (median(value for _, value in part) for part in (loss[:few], loss[-few:]))
        sentences.append(f"Training loss went from {first:.3g} to {last:.3g}.")
    now, first_time = accuracy(log), accuracy(log, 0)
    if now and first_time:
        moved = (
            f"from {first_time.percent} to {now.percent}" if len(log.points("val/pass@1")) > 1 else f"is {now.percent}"
        )
        known = f", {facts.problems} problems" if facts.problems else ""
        verb = "went " if moved.startswith("from") else ""
        sentences.append(f"Accuracy on held-out problems {verb}{moved} (95 % interval {now.span}{known}).")
    return " ".join(sentences)


def _tiles(facts: RunFacts, log: MetricsLog) -> list[Tile]:
    tiles = []
    solved = accuracy(log)
    if solved:
        known = f" · {facts.problems} problems" if facts.problems else ""
        tiles.append(Tile("Accuracy", solved.percent, f"{solved.span} (95 %){known}", solved))
    val_loss = log.points("val/loss")
    if val_loss:
        best = min(val_loss, key=lambda point: point[1])
        tiles.append(Tile("Validation loss", f"{val_loss[-1][1]:.3f}", f"lowest {best[1]:.3f} at step {best[0]:,}"))
    elif log.last("train/loss") is not None:
        tiles.append(Tile("Training loss", f"{log.last('train/loss'):.3f}"))
    tokens, trained = log.last("perf/total_tokens"), log.last("perf/total_trained_tokens")
    seconds = log.last("perf/total_seconds")
    if trained is not None:
        tiles.append(Tile("Trained tokens", count(trained), f"of {count(tokens)} read" if tokens else ""))
    if seconds is not None:
        tiles.append(Tile("Training time", duration(seconds), "validation not counted"))
    if tokens and seconds:
        tiles.append(Tile("Tokens a second", count(tokens / seconds), f"{count((trained or 0) / seconds)} trained"))
    mfu = log.points("perf/mfu")
    if mfu:
        tiles.append(Tile("FLOP utilisation", share(median(v for _, v in mfu)), "of the measured matmul rate"))
    saved = (facts.ledger.get("condensation") or {}).get("predicted_time_saved")
    if saved:
        tiles.append(Tile("Tokens saved", share(saved), "by condensation, of all that the model reads"))
    memory = log.highest("perf/peak_memory_gb")
    if memory is not None:
        tiles.append(Tile("Peak memory", f"{memory:.3g} GB"))
    return tiles


# ---- plots ----------------------------------------------------------------------------------------------------


def _drawn(*figures: Figure | None) -> list[Figure]:
    return [figure for figure in figures if figure is not None]


def _accuracy_plots(log: MetricsLog) -> list[Figure]:
    ends = [dict(log.points(f"val/pass@1_{end}")) for end in ("low", "high")]
    curves = []
    names = sorted((n for n in log.series if re.fullmatch(r"val/pass@\d+", n)), key=lambda n: int(n[9:]))
    for i, name in enumerate(names):
        points = log.points(name)
        band = [(step, ends[0][step], ends[1][step]) for step, _ in points if step in ends[0] and step in ends[1]]
        band = band if name == "val/pass@1" else []
        curves.append(Curve(name[4:], points, f"c{1 + i % 8}", markers=True, band=band))
    closings = [
        Curve("closed", log.points("val/closed"), "c3", markers=True),
        Curve("thoughts closed", log.points("val/traced"), "c1", markers=True, dashed=True),
        Curve("in a loop", log.points("val/repetition"), "c2", markers=True),
    ]
    length = Curve("tokens", log.points("val/generated_tokens"), "c4", markers=True)
    note = f"Share solved by generation; {INTERVAL_NOTE}." if any(c.band for c in curves) else ""
    ended = "Share of answers that came to their end, and that ran into a loop."
    return _drawn(
        line_plot("Accuracy", curves, note=note, percent=True),
        line_plot("How answers end", closings, note=ended, percent=True),
        line_plot("Length of answers", [length], unit="tokens a completion", from_zero=True),
    )


def _loss_plots(log: MetricsLog) -> list[Figure]:
    train = Curve("training", log.points("train/loss"), "c1", smooth=True)
    val = Curve("validation", log.points("val/loss"), "c2", markers=True)
    entropy = [
        Curve("training", log.points("train/entropy"), "c1", smooth=True),
        Curve("validation", log.points("val/entropy"), "c2", markers=True),
    ]
    hits = [
        Curve("training", log.points("train/accuracy"), "c1", smooth=True),
        Curve("validation", log.points("val/accuracy"), "c2", markers=True),
    ]
    return _drawn(
        line_plot("Loss", [train, val], unit="nats a token"),
        line_plot("Entropy of the predictions", entropy, unit="nats a token"),
        line_plot("Tokens predicted right", hits, note="The most likely token was the target.", percent=True),
    )


def _segment_plots(log: MetricsLog) -> list[Figure]:
    def curves(prefix: str, names: Sequence[str] = SEGMENT_NAMES) -> list[Curve]:
        return [
            Curve(name.replace("_", " "), log.points(prefix + name), SEGMENT_COLOURS[name], smooth=True)
            for name in names
        ]

    seam = [
        Curve("seam", log.points("train/loss_seam"), SEGMENT_COLOURS["seam"], smooth=True),
        Curve("all trained tokens", log.points("train/loss"), "c8", smooth=True, dashed=True),
    ]
    return _drawn(
        line_plot("Loss by segment", curves("train/loss_"), unit="nats a token"),
        line_plot("Loss by segment, validation", curves("val/loss_"), unit="nats a token"),
        line_plot("Entropy by segment", curves("train/entropy_"), unit="nats a token"),
        line_plot("Tokens right by segment", curves("train/accuracy_"), percent=True),
        line_plot("At the cut", seam, unit="nats a token", note="The first tokens after removed thoughts.")
        if seam[0].points
        else None,
        _decile_plot(log),
    )


def _decile_plot(log: MetricsLog) -> Figure | None:
    """Loss by where a thought stood in the full trace, at the run's start and at its end."""

    def mean_of_fifth(points: Points, *, first: bool) -> float | None:
        if not points:
            return None
        size = max(1, len(points) // 5)
        values = [value for _, value in (points[:size] if first else points[-size:])]
        return sum(values) / len(values)

    series = [log.points(f"train/loss_decile_{d}") for d in range(10)]
    return bar_plot(
        "Loss by place in the trace",
        [str(d + 1) for d in range(10)],
        [
            ("first fifth of the run", "c8", [mean_of_fifth(points, first=True) for points in series]),
            ("last fifth", "c1", [mean_of_fifth(points, first=False) for points in series]),
        ],
        unit="nats a token",
        x_label="tenth of the full trace",
    )


def _restart_plots(log: MetricsLog) -> list[Figure]:
    """What low-rank factors were like when a run restarted, and their rank from the first block to the last."""
    ranks = [
        Curve("mean of all products", log.points("restart/stable_rank"), "c1", markers=True),
        Curve("least", log.points("restart/stable_rank_min"), "c2", markers=True, dashed=True),
    ]
    defect = Curve("mean of all layers", log.points("restart/balance_defect"), "c4", markers=True)
    found = {re.fullmatch(r"restart/stable_rank_block_(\d+)", name): points for name, points in log.series.items()}
    blocks = dict(sorted((int(match[1]), points) for match, points in found.items() if match and points))
    by_block = [
        (label, colour, [points[at][1] for points in blocks.values()])
        for label, colour, at in (("first restart", "c8", 0), ("last restart", "c1", -1))
    ]
    note = "Squared Frobenius norm over squared largest singular value."
    return _drawn(
        line_plot("Stable rank", ranks, note=note, from_zero=True),
        line_plot("Balance defect before a restart", [defect], note="0: both factors alike.", from_zero=True),
        bar_plot("Stable rank by block", [str(block) for block in blocks], by_block, x_label="decoder block"),
    )


def _speed_plots(log: MetricsLog) -> list[Figure]:
    speed = [
        Curve("all tokens", log.points("perf/tokens_per_s"), "c1", smooth=True),
        Curve("trained tokens", log.points("perf/trained_tokens_per_s"), "c3", smooth=True),
    ]
    mfu = Curve("utilisation", log.points("perf/mfu"), "c4", smooth=True)
    memory = Curve("peak so far", log.points("perf/peak_memory_gb"), "c2")
    step = Curve("seconds", log.points("perf/step_s"), "c6", smooth=True)
    rates = [
        Curve(name, log.points(name), f"c{1 + i % 8}")
        for i, name in enumerate(n for n in log.series if n == "lr" or n.startswith("lr-"))
    ]
    return _drawn(
        line_plot("Throughput", speed, unit="tokens a second", from_zero=True),
        line_plot("FLOP utilisation", [mfu], note="Share of the matmul rate measured at the start.", from_zero=True),
        line_plot("Peak memory", [memory], unit="GB", from_zero=True),
        line_plot("Time of an optimizer step", [step], unit="seconds", from_zero=True),
        line_plot("Learning rate", rates, from_zero=True),
    )


# ---- tables ---------------------------------------------------------------------------------------------------


def _samples(samples: Sequence[Sample]) -> Section:
    checked = [sample.right for sample in samples if sample.right is not None]
    note = f"{sum(checked)} of the {len(checked)} shown were accepted by the checker." if checked else ""
    return Section("What the model writes", note, samples=samples)


def _data(ledger: Mapping[str, Any]) -> Section:
    counts = ledger.get("condensation") or {}
    before, after = counts.get("tokens_before") or {}, counts.get("tokens_after") or {}
    tables = [_token_table(before, after)] if before else []
    tables += [
        _count_table(heading, found)
        for heading, found in (
            ("rows by outcome", counts.get("rows")),
            ("final answers", counts.get("answers")),
            ("condensed to fit the length", counts.get("fit")),
            ("rows by length", ledger.get("dropped")),
            ("rows that could not be used", ledger.get("bad_rows")),
        )
        if found
    ]
    notes = [f"{ledger['rows']:,} training rows."] if ledger.get("rows") is not None else []
    condensed = counts.get("condensed") or {}
    if condensed.get("turns"):
        kept = f"{share(counts['thought_ratio'])} of their thoughts and {share(counts['token_ratio'])} of their tokens"
        notes.append(f"{condensed['turns']:,} traces were condensed: {kept} were kept.")
    notes += [f"{note[:1].upper()}{note[1:]}." for note in ledger.get("notes") or ()]
    return Section("Training data", " ".join(notes), _drawn(_token_plot(before, after)), tables)


def _count_table(heading: str, found: Mapping[str, int]) -> Table:
    """Counts, the largest first."""
    rows = sorted(found.items(), key=lambda item: -item[1])
    return Table((heading, ""), [(what, f"{n:,}") for what, n in rows])


def _token_table(before: Mapping[str, int], after: Mapping[str, int]) -> Table:
    """Tokens by part of the conversation, before and after condensation, and the share kept."""
    pairs = [(part, before.get(part, 0), after.get(part, 0)) for part in PARTS]
    pairs.append(("all", sum(before.values()), sum(after.values())))
    rows = [(part, f"{old:,}", f"{new:,}", share(new / old) if old else None) for part, old, new in pairs]
    return Table(("tokens", "before", "after", "kept"), rows)


def _token_plot(before: Mapping[str, int], after: Mapping[str, int]) -> Figure | None:
    """The same as bars, when condensation changed anything."""
    if dict(before) == dict(after):
        return None
    groups = [
        ("before", "c8", [before.get(part, 0) for part in PARTS]),
        ("after", "c1", [after.get(part, 0) for part in PARTS]),
    ]
    return bar_plot("Condensation", PARTS, groups, unit="tokens")


def _all_metrics(log: MetricsLog) -> list[Table]:
    rows = []
    for name, points in log.series.items():
        values = [value for _, value in points]
        numbers = (values[0], values[-1], min(values), max(values))
        rows.append((name, *(f"{number:.4g}" for number in numbers), f"{len(values):,}"))
    return [Table(("metric", "first", "last", "lowest", "highest", "values"), rows)] if rows else []


def _machine(facts: RunFacts) -> Section:
    rows = list(facts.versions.items())
    if facts.command:
        rows.append(("command", facts.command))
    return Section("Versions and machine", tables=[Table((), rows, text_columns=2)] if rows else [], folded=True)
