"""What a recipe may say about attributions. No torch import: the command line reads it for its help."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lit_reason.errors import UserError, did_you_mean

SHARES = ("final", "uniform", "attention")  # shares of the reward, which cost no masked copies
SIGNED = ("prefix", "shap", "lime", "owen")  # amounts of reward, from the reward of masked or shortened copies
Players = Literal["token", "span", "sentence", "thought"]
Masking = Literal["pad", "token", "reference", "delete"]
Mode = Literal["additive", "ratio", "abs", "softmax"]


@dataclass(frozen=True)
class AttributionConfig:
    """How the reward of a whole response becomes credit of its tokens.

    Args:
        players: what is masked together: every `token`, a `span` of `span_tokens`, a `sentence`, or a `thought`. A
            player's attribution is spread evenly over its tokens.
        span_tokens: tokens of a span; also of the blocks of `owen`.
        masking: what stands for a masked token: `pad` (attention 0 in its place), the `token` numbered `fill_id`, the
            token of a `reference` response in the same place, or nothing (`delete`: what follows moves up).
        fill_id: token for `masking: token`, and where a reference is shorter.
        shapley: `exact` enumerates coalitions (up to 12 players), `permutation` draws orders in antithetic pairs,
            `kernel` solves the weighted least squares of Kernel SHAP; `auto` is exact where that costs no more, and
            otherwise `kernel`.
        evaluations: most masked copies a response for `shap`, `lime` and `owen`, each.
        evaluations_a_player: the same a player: the smaller of the two holds.
        lime_width: width of LIME's locality kernel over the cosine distance to the whole response.
        lime_ridge: weight of the squared coefficients in LIME's regression.
        mode: how `prefix`, `shap`, `lime` and `owen` become credit that sums to the reward: `additive` keeps each
            amount and pays what is left over at the last token; `ratio`, `abs` and `softmax` split the reward in
            proportion to the amounts, their absolute values, or `exp(amount / temperature)`.
        temperature: of `softmax`.
        fraction: share of the responses for which masked copies are scored; the others get `otherwise`.
        otherwise: explainer in place of those that need masked copies.
        batch: masked copies scored at once.
        cache: responses whose attributions are kept; rollouts of a group are often equal.
        repeats: scores averaged where a reward turns out not to be deterministic.
        timeout_s: seconds after which explaining a response is given up; its whole reward is then paid at its last
            token, and it is counted. Looked at between batches.
    """

    players: Players = "token"
    span_tokens: int = 4
    masking: Masking = "pad"
    fill_id: int | None = None
    shapley: Literal["auto", "exact", "permutation", "kernel"] = "auto"
    evaluations: int = 512
    evaluations_a_player: int = 10
    lime_width: float = 0.25
    lime_ridge: float = 1e-3
    mode: Mode = "additive"
    temperature: float = 1.0
    fraction: float = 1.0
    otherwise: Literal["final", "uniform", "attention"] = "uniform"
    batch: int = 256
    cache: int = 4096
    repeats: int = 4
    timeout_s: float = 60.0

    def __post_init__(self) -> None:
        for name in ("span_tokens", "evaluations", "evaluations_a_player", "batch", "repeats"):
            if getattr(self, name) < 1:
                raise UserError(f"attribution.{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("temperature", "timeout_s", "lime_width"):
            if not getattr(self, name) > 0:
                raise UserError(f"attribution.{name} is {getattr(self, name)}; it must be above 0")
        if not 0 <= self.fraction <= 1:
            raise UserError(f"attribution.fraction is {self.fraction}; it must be in [0, 1]")
        if self.masking == "token" and self.fill_id is None:
            raise UserError(
                "attribution.masking token needs attribution.fill_id, the token that stands for masked ones"
            )


def check_explainers(names: tuple[str, ...] | list[str]) -> None:
    """Refuse names that are no explainers, or that stand twice.

    Args:
        names: as a recipe has them.

    Raises:
        UserError: names the wrong one.
    """
    allowed = SHARES + SIGNED
    if not names:
        raise UserError(f"no explainer is named; there are {', '.join(allowed)}")
    for name in names:
        if name not in allowed:
            raise UserError(f"explainer '{name}'{did_you_mean(name, allowed)}; there are {', '.join(allowed)}")
        if list(names).count(name) > 1:
            raise UserError(f"explainer '{name}' is named twice")
