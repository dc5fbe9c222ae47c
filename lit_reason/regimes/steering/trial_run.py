"""The trial of a file of directions: what is generated with and without them, and what an independent judge says."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from lit_reason.data.labelled.texts import LabelledText
from lit_reason.data.prompts import EvalPrompt
from lit_reason.errors import UserError
from lit_reason.metrics.intervals import bootstrap_ratio
from lit_reason.metrics.repetition import tail_repeats
from lit_reason.regimes.steering.config import TrialConfig
from lit_reason.rollout.config import SamplingConfig
from lit_reason.steering.config import SteerConfig
from lit_reason.steering.direction_file import Directions
from lit_reason.steering.hook import SteeringHook
from lit_reason.steering.judge import WordJudge, distinct, words
from lit_reason.steering.trial import Generated, generate, perplexity


@dataclass(frozen=True)
class Trying:
    """How directions are tried out.

    Attributes:
        trial: strengths and targets.
        steer: how they are added; a trial replaces mix and strength.
        sampling: how tokens are drawn, and how many continuations a prompt gets.
        stop_ids: tokens that end a text.
    """

    trial: TrialConfig
    steer: SteerConfig
    sampling: SamplingConfig
    stop_ids: Sequence[int]


@dataclass(frozen=True)
class Cell:
    """All continuations under one target and strength, and what was measured on them.

    Attributes:
        target: name of the direction; None without any.
        strength: of it.
        judged: by class, the share of texts that the judge puts there.
        low: by class, lower end of that share's 95 % bootstrap interval over prompts.
        high: by class, upper end.
        perplexity: of the continuations under the model without directions.
        distinct_1: different words, as a share of all.
        distinct_2: different pairs of words, as a share of all.
        repeating: share of texts that end in a loop of words.
        tokens: mean length.
        texts: the continuations, in the order of the prompts.
        verdicts: the class that the judge puts each of them in.
    """

    target: str | None
    strength: float
    judged: dict[str, float]
    low: dict[str, float]
    high: dict[str, float]
    perplexity: float
    distinct_1: float
    distinct_2: float
    repeating: float
    tokens: float
    texts: list[str]
    verdicts: list[str]


@dataclass(frozen=True)
class Trial:
    """Cells of a trial.

    Attributes:
        classes: names of the classes.
        cells: without directions first, then by target and strength.
        chosen: by target, the cell at which targets are compared; None where even the weakest was too much.
        judge_accuracy: on held-out texts that neither judge nor directions saw; None without any.
        prompts: the prompts' texts.
        samples: continuations of each prompt.
    """

    classes: list[str]
    cells: list[Cell]
    chosen: dict[str, Cell | None]
    judge_accuracy: float | None
    prompts: list[str]
    samples: int

    def figures(self) -> dict[str, float]:
        """What the log gets: by target, success without and with its direction where targets are compared."""
        off, found = self.cells[0], {"test/perplexity_off": self.cells[0].perplexity}
        if self.judge_accuracy is not None:
            found["test/judge_accuracy"] = self.judge_accuracy
        for target, cell in self.chosen.items():
            found[f"test/success_off_{target}"] = off.judged[target]
            if cell is not None:
                found[f"test/success_{target}"] = cell.judged[target]
                found[f"test/perplexity_{target}"] = cell.perplexity
                found[f"test/strength_{target}"] = cell.strength
        return found

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for a JSON file."""
        chosen = {target: cell and cell.strength for target, cell in self.chosen.items()}
        return {**asdict(self), "chosen": chosen}


def run_trial(
    lm: Any,
    tokenizer: Any,
    directions: Directions,
    prompts: Sequence[EvalPrompt],
    judge_texts: Sequence[LabelledText],
    held_out: Sequence[LabelledText],
    how: Trying,
) -> Trial:
    """Generate with and without each direction at each strength, and judge.

    Args:
        lm: the language model.
        tokenizer: its tokenizer.
        directions: to be tried.
        prompts: what is continued.
        judge_texts: labelled texts that the judge learns from; directions never saw them.
        held_out: labelled texts that nothing was fitted on, to see how good the judge is.
        how: settings.

    Raises:
        UserError: there is no text for the judge, or a target is unknown.
    """
    classes = sorted({text.label for text in judge_texts})
    if not judge_texts:
        raise UserError(
            "test needs texts for its judge: set data.judge_share above 0, as in the run that found the file"
        )
    targets = list(directions.vectors) if how.trial.targets is None else how.trial.targets
    for target in targets:
        directions.get(target)
    judge = WordJudge([t.text for t in judge_texts], [classes.index(t.label) for t in judge_texts], len(classes))
    ids = [prompt.ids for prompt in prompts]

    def cell(target: str | None, strength: float) -> Cell:
        hook = None
        if target is not None:
            hook = SteeringHook(lm.base, directions, replace(how.steer, mix={target: 1.0}, strength=strength))
        texts = generate(lm, tokenizer, ids, how.sampling, how.stop_ids, hook)
        return measured(target, strength, texts, judge([t.text for t in texts]), classes)

    off = cell(None, 0.0)
    grid = {target: [cell(target, strength) for strength in sorted(set(how.trial.strengths))] for target in targets}
    limit = how.trial.perplexity_ratio * off.perplexity
    chosen = {t: next((c for c in reversed(cells) if c.perplexity <= limit), None) for t, cells in grid.items()}
    known = judge([t.text for t in held_out])
    right = [classes[k] == t.label for k, t in zip(known, held_out, strict=True)]
    accuracy = sum(right) / len(right) if right else None
    cells = [off, *(c for row in grid.values() for c in row)]
    return Trial(classes, cells, chosen, accuracy, [p.text for p in prompts], how.sampling.samples)


def check_trial(config: TrialConfig) -> None:
    """Refuse a trial of nothing, and a limit that no text could keep.

    Args:
        config: what `test` tries.

    Raises:
        UserError: which setting, and what is allowed.
    """
    if not config.strengths or min(config.strengths) < 0 or not all(map(math.isfinite, config.strengths)):
        raise UserError(f"trial.strengths is {config.strengths}; it must be numbers from 0 on, one at least")
    if config.targets == []:
        raise UserError("trial.targets is empty: name directions, or set it to null to try all of the file")
    if not config.perplexity_ratio >= 1:
        raise UserError(f"trial.perplexity_ratio is {config.perplexity_ratio}; it must be at least 1")


def measured(
    target: str | None, strength: float, texts: Sequence[Generated], verdicts: Sequence[int], classes: Sequence[str]
) -> Cell:
    """The figures of a cell.

    Args:
        target: name of the direction.
        strength: of it.
        texts: the continuations.
        verdicts: class of each by the judge.
        classes: names of the classes.
    """
    prompts = sorted({t.prompt for t in texts})
    counts = [float(sum(t.prompt == p for t in texts)) for p in prompts]
    judged, low, high = {}, {}, {}
    for k, name in enumerate(classes):
        hits = [float(sum(t.prompt == p and v == k for t, v in zip(texts, verdicts, strict=True))) for p in prompts]
        judged[name] = sum(hits) / sum(counts)
        low[name], high[name] = bootstrap_ratio(hits, counts)
    plain = [t.text for t in texts]
    return Cell(
        target,
        strength,
        judged,
        low,
        high,
        perplexity(texts),
        distinct(plain, 1),
        distinct(plain, 2),
        sum(_loops(text) for text in plain) / len(plain),
        sum(t.tokens for t in texts) / len(texts),
        plain,
        [classes[v] for v in verdicts],
    )


def _loops(text: str) -> bool:
    numbers: dict[str, int] = {}
    return tail_repeats([numbers.setdefault(w, len(numbers)) for w in words(text)], copies=3, min_tokens=6)
