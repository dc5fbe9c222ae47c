"""What a recipe may say about trying directions out. No torch import here: the command line reads this for its help."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class TrialConfig:
    """The trial that `test` runs: every prompt continued without directions and with each of them, at some strengths.

    Args:
        strengths: strengths to try, in units of `steer.unit`.
        targets: directions to try, one at a time; None takes all of the file.
        perplexity_ratio: methods and targets are compared at the highest strength whose texts are at most so many times
            as surprising to the model without directions as its own.
    """

    strengths: list[float] = field(default_factory=lambda: [0.1, 0.2, 0.3])
    targets: list[str] | None = None
    perplexity_ratio: float = 2.0
