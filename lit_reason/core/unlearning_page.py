"""The page's part on unlearning: what is forgotten, and what it costs"""

from __future__ import annotations

from lit_reason.core.metrics_log import MetricsLog
from lit_reason.core.plots import Curve, line_plot
from lit_reason.core.report import Section


def unlearning_section(log: MetricsLog) -> Section:
    """Losses of both sets, and the parts of the final score by validation.

    Args:
        log: the run's metrics; without a forget set the section is empty, and left out of the page.
    """
    if not (log.points("train/forget_loss") or log.points("val/forget_loss")):
        return Section("Forgetting")
    sets = [
        Curve(
            f"{name}, {prefix}", log.points(f"{key}/{name}_loss"), colour, smooth=key == "train", markers=key == "val"
        )
        for name, colours in (("forget", ("c6", "c3")), ("retain", ("c1", "c2")))
        for (key, prefix), colour in zip((("train", "training"), ("val", "validation")), colours, strict=True)
    ]
    parts = [
        Curve(name, log.points(f"val/{key}"), colour, markers=True)
        for name, key, colour in (
            ("task aggregate", "aggregate", "c6"),
            ("attack score", "attack", "c3"),
            ("utility", "utility", "c1"),
            ("final", "final", "c2"),
        )
    ]
    figures = [
        line_plot("Loss by set", sets, unit="nats a token", note="Forgetting lifts the one and leaves the other."),
        line_plot("Parts of the final score", parts, note="By validation; higher is better for all of them."),
    ]
    return Section("Forgetting", figures=[figure for figure in figures if figure is not None])
