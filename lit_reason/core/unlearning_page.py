"""The page's part on unlearning: what is forgotten, and what it costs"""

from __future__ import annotations

from statistics import fmean

from lit_reason.core.metrics_log import MetricsLog, Points
from lit_reason.core.plots import Curve, line_plot
from lit_reason.core.report import Section, Table

PROBES = (("trained on other rows to forget", "relearn"), ("weights rounded to 4 bits", "quantized"))


def unlearning_section(log: MetricsLog) -> Section:
    """Losses and scores of both sets and the parts of the final score by validation; what probes brought back.

    Args:
        log: the run's metrics; without a forget set the section is empty, and left out of the page.
    """
    if not (log.points("train/forget_loss") or log.points("val/forget_loss")):
        return Section("Forgetting")
    losses = [
        Curve(
            f"{name}, {prefix}", log.points(f"{key}/{name}_loss"), colour, smooth=key == "train", markers=key == "val"
        )
        for name, colours in (("forget", ("c6", "c3")), ("retain", ("c1", "c2")))
        for (key, prefix), colour in zip((("train", "training"), ("val", "validation")), colours, strict=True)
    ]
    kept = [
        Curve(f"{name} set", _remembered(log, name), colour, markers=True)
        for name, colour in (("forget", "c3"), ("retain", "c2"))
    ]
    parts = [
        Curve(name, log.points(f"val/{key}"), colour, markers=True)
        for name, key, colour in (
            ("task aggregate", "aggregate", "c6"),
            ("attack score", "attack", "c3"),
            ("utility", "utility", "c1"),
            ("composite", "composite", "c2"),
        )
    ]
    figures = [
        line_plot("Loss by set", losses, unit="nats a token", note="Forgetting lifts the one and leaves the other."),
        line_plot("Remembered", kept, percent=True, note="Mean of the scores of a set, by validation."),
        line_plot(
            "Parts of the final score",
            parts,
            note="By validation; higher is better. Composite: mean of the others, the aggregate with a floor.",
        ),
    ]
    return Section("Forgetting", figures=[f for f in figures if f is not None], tables=_probes(log))


def _remembered(log: MetricsLog, name: str) -> Points:
    """Mean of all scores of a set, by step."""
    by_step: dict[int, list[float]] = {}
    for key, points in log.series.items():
        if key.startswith(f"val/{name}_") and key.endswith(("_knowledge", "_regurgitation")):
            for step, value in points:
                by_step.setdefault(step, []).append(value)
    return [(step, fmean(values)) for step, values in sorted(by_step.items())]


def _probes(log: MetricsLog) -> list[Table]:
    """What came back of the rows to forget, a line a probe."""
    columns = ("loss_before", "loss_after", "memory_before", "memory_after")
    found = [(name, *(log.last(f"probe/{key}_{column}") for column in columns)) for name, key in PROBES]
    rows = [[name, *(f"{value:.3f}" for value in values)] for name, *values in found if None not in values]
    if not rows:
        return []
    return [
        Table(
            ("what was done to the model", "loss before", "loss after", "remembered before", "remembered after"),
            rows,
            title="What came back",
            note="Of rows to forget: mean loss in nats a token, and mean score. The weights were put back.",
        )
    ]
