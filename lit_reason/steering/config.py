"""What a recipe may say about finding and adding directions. No torch import here: the command line reads this."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Method = Literal[
    "confident", "same_count", "mean_difference", "mean", "caa", "probe_weight", "act_add", "random"
]  # what each is: `steering.direction`


@dataclass(frozen=True)
class DirectionConfig:
    """How directions are found in labelled texts.

    Args:
        method: `confident` averages the features that a probe is sure of (arXiv 2503.02989); `same_count` draws as many
            at random, the control. `mean_difference` is the class mean less the mean of the others, `mean` the class
            mean as it is, `caa` the mean difference within pairs at the last token, `probe_weight` the probe's own
            weights, `act_add` the difference of two prompts, `random` a Gaussian vector.
        layer: decoder layer whose output is read and steered, from 0; None takes the one whose probe has the lowest
            loss on texts it has not seen (with `folds` 0: on those it has), without any generation.
        layers: layers to choose from when `layer` is None; None takes eight from the second to the last but one.
        segment: what a feature is: every `token`, the `mean` over the segment, or its tokens end to end (`concat`).
        first: position in the text at which the segment begins; position 0 is an outlier in many models.
        length: tokens of the segment; None takes all to the text's end (not with `concat`).
        beta: a feature is kept when the probe gives its class more than this probability.
        center: subtract the mean of the class means from the average. False is the paper's literal reading.
        folds: the probability of a feature comes from a probe fitted without its text, in so many parts. 0 takes the
            probe that has seen it, as the paper does.
        penalty: weight of the probe's squared weights, against a mean loss; features are standardised.
        on_empty: when fewer than `min_selected` features are kept: `error`, the `topk` likeliest, or the class `mean`.
        min_selected: fewest features that an average may be made of.
        cap: most features a class and layer that are held in memory; a draw from all when there are more.
        contrast: for `act_add`: by name, the prompt to go towards and the one to come from.
    """

    method: Method = "confident"
    layer: int | None = None
    layers: list[int] | None = None
    segment: Literal["token", "mean", "concat"] = "token"
    first: int = 1
    length: int | None = None
    beta: float = 0.5
    center: bool = True
    folds: int = 5
    penalty: float = 0.05
    on_empty: Literal["error", "topk", "mean"] = "error"
    min_selected: int = 10
    cap: int = 2000
    contrast: dict[str, list[str]] = field(default_factory=dict)

    @property
    def one_token(self) -> bool:
        """Whether a direction is one vector, and not several laid over a prompt."""
        return self.segment != "concat" and self.method != "act_add"


@dataclass(frozen=True)
class SteerConfig:
    """How directions are added while a model runs: `h + strength * sum_k weight_k v_k` at the file's layer.

    Args:
        mix: weight of each direction, by name; a negative weight steers away.
        strength: factor on the whole mix; None takes the file's own, which is that of the fit that made it.
        unit: `residual_norm` makes each direction as long as the layer's median state, so that strengths compare
            between layers and models; `raw` adds them as they were found.
        phases: steer the tokens of the `prompt`, those of the `generation`, or `all`.
        first_position: first position of a row that is steered.
        last_position: last position of a row that is steered; None is the end.
        keep_norm: give each steered state the length that it had.
        max_norm: longest sum of directions, as a share of the layer's median state; None sets no limit.
        other_weights: accept directions that were found in a model of this shape with other weights.
    """

    mix: dict[str, float] = field(default_factory=dict)
    strength: float | None = None
    unit: Literal["residual_norm", "raw"] = "residual_norm"
    phases: Literal["all", "prompt", "generation"] = "all"
    first_position: int = 0
    last_position: int | None = None
    keep_norm: bool = False
    max_norm: float | None = None
    other_weights: bool = False
