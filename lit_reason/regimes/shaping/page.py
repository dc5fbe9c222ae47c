"""What a search leaves on the page of its run: trials on the simplex, what they cost, tokens coloured by credit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec

import torch

from lit_reason.core.plots import COLOURS, Curve, Figure, line_plot, simplex_plot
from lit_reason.core.report import Passage, Piece, Scale, Section, Table, duration
from lit_reason.regimes.shaping.surrogate import acquisition, posterior
from lit_reason.regimes.shaping.token_rewards import answer
from lit_reason.regimes.shaping.trials import Trial, observations
from lit_reason.rewards.attribution.attributor import Explanation
from lit_reason.rollout.trajectory import Trajectory

FINENESS = 14  # steps along an edge of the simplex
ANSWERS = 3  # shown with the credit of their tokens
NOTHING = 1e-6  # share of the strongest credit that counts as none
DEEPEST = 10.0  # below the highest log improvement, where all is alike


def search_section(trials: Sequence[Trial], explainers: Sequence[str], *, surrogate: bool) -> Section:
    """The trials of a search: weights, objectives, what the surrogate believes, and the costs.

    Args:
        trials: so far.
        explainers: names, in the order of the weights.
        surrogate: whether the search has one.
    """
    ended = [t for t in trials if t.kind != "final" and t.status != "running"]
    if not ended:
        return Section("Search of the shaping weights")
    chosen = [t for t in trials if t.kind == "final"]
    found = ", ".join(f"{n} {w:.2f}" for n, w in zip(explainers, chosen[-1].weights, strict=True)) if chosen else ""
    note = f"{len(ended)} inner runs." + (f" The final run has {found}." if found else "")
    believed = surrogate and len(ended) > 1 and find_spec("botorch") is not None
    figures = [_weights(ended, explainers), _objectives(ended, believed)]
    figures += _surface(trials, explainers) if believed else []
    tables = [_trials(trials, explainers), _costs(trials)]
    return Section("Search of the shaping weights", note, [f for f in figures if f is not None], tables)


def _weights(ended: Sequence[Trial], explainers: Sequence[str]) -> Figure | None:
    curves = [
        Curve(name, [(t.number, t.weights[k]) for t in ended], COLOURS[k % len(COLOURS)], markers=True)
        for k, name in enumerate(explainers)
    ]
    return line_plot("Weights by trial", curves, x_label="trial", percent=True)


def _objectives(ended: Sequence[Trial], believed: bool) -> Figure | None:
    seen = [t for t in ended if t.objective is not None]
    band = [
        (float(t.number), t.objective - 2 * d, t.objective + 2 * d) for t in seen if (d := (t.variance or 0) ** 0.5)
    ]  # type: ignore[operator]
    curves = [Curve("observed", [(t.number, t.objective or 0.0) for t in seen], "c1", markers=True, band=band)]
    if believed:
        mean, _ = posterior(*observations(ended))
        points = [(float(t.number), m) for t, m in zip(ended, mean.tolist(), strict=True)]
        curves.append(Curve("posterior mean", points, "c2", dashed=True, markers=True))
    note = "Unshaped score on held-out prompts less the weighted divergence, with two standard errors."
    return line_plot("Objective by trial", curves, x_label="trial", note=note)


def _surface(trials: Sequence[Trial], explainers: Sequence[str]) -> list[Figure | None]:
    """What the surrogate believes between the trials, for two and three explainers; more cannot be drawn."""
    data, K = observations(trials), len(explainers)
    marks = [(t.weights, "" if t.kind == "final" else str(t.number)) for t in trials if t.kind != "rerun"]
    if K == 2:
        at = torch.linspace(0, 1, 3 * FINENESS).double()
        grid = torch.stack([at, 1 - at], 1)
        mean, deviation = posterior(*data, grid)
        low, high = (mean - 2 * deviation).tolist(), (mean + 2 * deviation).tolist()
        believed = Curve("posterior", list(zip(at.tolist(), mean.tolist(), strict=True)), "c1",
                         band=list(zip(at.tolist(), low, high, strict=True)))  # fmt: skip
        seen = sorted((t.weights[0], t.objective) for t in trials if t.objective is not None and t.kind != "final")
        hoped = Curve("log improvement", list(zip(at.tolist(), acquisition(*data, grid).tolist(), strict=True)), "c4")
        label = f"weight of {explainers[0]}"
        return [
            line_plot("Posterior", [believed, Curve("trials", seen, "c2", markers=True, dashed=True)], x_label=label),
            line_plot("Acquisition", [hoped], x_label=label),
        ]
    if K != 3:
        return []
    steps = range(FINENESS + 1)
    grid = (
        torch.tensor([[i, j, FINENESS - i - j] for i in steps for j in steps if i + j <= FINENESS]).double() / FINENESS
    )
    mean, _ = posterior(*data, grid)
    hoped_for = acquisition(*data, grid)
    hoped_for = hoped_for.clamp(min=float(hoped_for.max()) - DEEPEST)
    note = "Dots are trials by number; the largest is the final run's mix."
    return [
        simplex_plot(
            "Posterior mean", explainers, list(zip(grid.tolist(), mean.tolist(), strict=True)), marks, note=note
        ),
        simplex_plot(
            "Acquisition",
            explainers,
            list(zip(grid.tolist(), hoped_for.tolist(), strict=True)),
            marks,
            note="Logarithm of the noisy expected improvement of one more trial.",
        ),
    ]


def _trials(trials: Sequence[Trial], explainers: Sequence[str]) -> Table:
    def row(t: Trial) -> list[object]:
        error = None if t.variance is None else f"± {2 * t.variance**0.5:.3g}"
        shown = [None if t.objective is None else f"{t.objective:.4g}", error]
        facts = [f"{t.facts[name]:.3g}" if name in t.facts else None for name in ("score", "kl", "length")]
        return [f"{t.number} {t.kind}", t.status, *(f"{w:.2f}" for w in t.weights), *shown, *facts]

    columns = ["trial", "", *explainers, "objective", "2 s.e.", "score", "KL, nats", "tokens"]
    return Table(columns, [row(t) for t in trials], "Trials", text_columns=2)


def _costs(trials: Sequence[Trial]) -> Table:
    """Inner runs by kind, and what the outer problem itself took."""
    rows: list[list[object]] = []
    for kind in ("search", "rerun", "final"):
        of = [t.facts for t in trials if t.kind == kind]
        if of:
            total = {name: sum(f.get(name, 0.0) for f in of) for name in COSTS}
            times = [duration(total["seconds"]), duration(total["evaluation_seconds"])]
            rows.append([kind, len(of), *times, f"{total['reward_calls']:,.0f}", f"{total['sampled_tokens']:,.0f}"])
    outer = sum(t.facts.get("outer_seconds", 0.0) for t in trials)
    rows.append(["surrogate and store", None, duration(outer), None, None, None])
    columns = ["", "runs", "training", "held-out evaluation", "reward calls", "tokens sampled"]
    return Table(columns, rows, "Cost", "A claim of speed has to count the search: it is this table's sum.")


COSTS = ("seconds", "evaluation_seconds", "reward_calls", "sampled_tokens")


def credit_section(
    shown: Sequence[tuple[Trajectory, Explanation]],
    explainers: Sequence[str],
    weights: Sequence[float],
    decode: Callable[[Sequence[int]], str],
) -> Section:
    """The newest answers, every token coloured by its credit under each explainer and under the mix.

    Args:
        shown: answers and their explanations.
        explainers: names, in the order of the weights.
        weights: of the mix.
        decode: ids to text.
    """
    different = {tuple(t.ids): (t, e) for t, e in shown if e.credit_KT.shape[1]}
    longest = sorted(different.values(), key=lambda s: -s[1].credit_KT.shape[1])[:ANSWERS]
    if not longest:
        return Section("Credit of tokens")
    reach = max(float(e.credit_KT.abs().max()) for _, e in longest) or 1.0
    passages = []
    for t, e in longest:
        start, stop = answer(t)
        texts = [decode([i]) for i in t.ids[start:stop]]
        mix = torch.tensor(weights, dtype=torch.float64) @ e.credit_KT
        rows = [*zip(explainers, e.credit_KT, strict=True)] + ([("mix", mix)] if len(explainers) > 1 else [])
        for number, (name, credit_T) in enumerate(rows):
            title = f"{t.row_id}: {name}" if number == 0 else name
            passages.append(
                Passage(title, [f"reward {e.reward:.3g}"] if number == 0 else [], _pieces(texts, credit_T, reach))
            )
    note = "Every token of an answer by its credit: each row of colours sums to the answer's reward."
    scale = Scale(f"{-reach:+.2g}", "no credit", f"{reach:+.2g}")
    return Section("Credit of tokens", note, passages=passages, scale=scale)


def _pieces(texts: Sequence[str], credit_T: torch.Tensor, reach: float) -> list[Piece]:
    return [
        Piece(text, "", _colour(credit / reach), strength=min(abs(credit) / reach, 1.0))
        for text, credit in zip(texts, credit_T.tolist(), strict=True)
    ]


def _colour(share: float) -> str:
    return "muted" if abs(share) < NOTHING else "above" if share > 0 else "below"
