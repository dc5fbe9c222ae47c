"""Metrics of unlearning: recall of continuations, exact answers, the loss attack, and four-choice questions.

A row that several processes score, as a sampler's padding makes them do, counts once: states hold row names.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import cache
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from lit_reason.errors import UserError


def row_key(row_id: str) -> int:
    """A row's name as a number that fits a tensor.

    Args:
        row_id: the name.
    """
    return int.from_bytes(hashlib.sha256(row_id.encode()).digest()[:8]) >> 1


class ByRow(Metric):
    """A number for each row, kept with the row's name and group, so that no row counts twice.

    Args:
        groups: names of the groups; the same on all processes.
    """

    full_state_update = False
    keys: list[Tensor]
    group: list[Tensor]
    values: list[Tensor]

    def __init__(self, groups: Sequence[str]) -> None:
        super().__init__()
        self.groups = tuple(groups)
        for name in ("keys", "group", "values"):
            self.add_state(name, [], dist_reduce_fx="cat")
        self._open()

    def reset(self) -> None:
        """Forget all rows. States are opened with nothing in them, which a process without rows can exchange too."""
        super().reset()
        self._open()

    def _open(self) -> None:
        self.keys, self.group = [self._none(torch.int64)], [self._none(torch.int64)]
        self.values = [self._none(torch.float64)]

    def _none(self, dtype: torch.dtype) -> Tensor:
        return torch.zeros(0, dtype=dtype, device=self.device)

    def add(self, row_ids: Sequence[str], groups: Sequence[str], values: Sequence[float] | Tensor) -> None:
        """Add rows.

        Args:
            row_ids: their names.
            groups: group of each, one of those the metric was made with.
            values: number of each.
        """
        at = {name: i for i, name in enumerate(self.groups)}
        device = self.device
        self.keys.append(torch.tensor([row_key(r) for r in row_ids], dtype=torch.int64, device=device))
        self.group.append(torch.tensor([at[g] for g in groups], dtype=torch.int64, device=device))
        self.values.append(torch.as_tensor(values, dtype=torch.float64).to(device).detach())

    def by_group(self) -> dict[str, Tensor]:
        """The values of each group that has any, one a row."""
        states: Any = (self.keys, self.group, self.values)
        keys, group, values = (dim_zero_cat(state).cpu() for state in states)
        first: dict[tuple[int, int], float] = {}
        for key, where, value in zip(keys.tolist(), group.tolist(), values.tolist(), strict=True):
            first.setdefault((where, key), value)
        found: dict[str, list[float]] = {}
        for (where, _), value in sorted(first.items()):
            found.setdefault(self.groups[where], []).append(value)
        return {name: torch.tensor(numbers, dtype=torch.float64) for name, numbers in found.items()}

    def compute(self) -> dict[str, float]:
        """The mean of each group that has any row."""
        return {name: float(numbers.mean()) for name, numbers in self.by_group().items()}


class RowMeans(ByRow):
    """Plain means of numbers that somebody else found.

    Args:
        groups: as in `ByRow`.
    """

    def update(self, row_ids: Sequence[str], groups: Sequence[str], values: Sequence[float] | Tensor) -> None:
        """Add rows.

        Args:
            row_ids: their names.
            groups: group of each.
            values: number of each.
        """
        self.add(row_ids, groups, values)


def rouge_l_recall(written: str, reference: str) -> float:
    """ROUGE-L recall with stemming: the longest common subsequence as a share of the reference's words.

    Args:
        written: what the model wrote; an empty text recalls nothing.
        reference: what it is compared with.

    Raises:
        UserError: the package is not installed.
    """
    return rouge_scorer().score(reference, written)["rougeL"].recall


@cache
def rouge_scorer() -> Any:
    """The scorer of the package `rouge-score`.

    Raises:
        UserError: the package is not installed.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise UserError("ROUGE-L needs rouge-score: pip install 'lit-reason[unlearn]'") from error
    return RougeScorer(["rougeL"], use_stemmer=True)


def is_exact(written: str, reference: str) -> bool:
    """Whether an answer is the reference, but for case and blanks around it.

    Args:
        written: the answer.
        reference: the right one.
    """
    return written.strip().lower() == reference.strip().lower()


class TextScore(ByRow):
    """Written texts beside what the model would have written from memory, a score each, averaged by group.

    Args:
        groups: as in `ByRow`.

    Attributes:
        of: the score of a written text, given the reference.
    """

    of: Callable[[str, str], float | bool]

    def update(
        self, row_ids: Sequence[str], groups: Sequence[str], written: Sequence[str], references: Sequence[str]
    ) -> None:
        """Add texts.

        Args:
            row_ids: names of the rows.
            groups: group of each.
            written: what the model wrote.
            references: what it would have written from memory.
        """
        pairs = zip(written, references, strict=True)
        self.add(row_ids, groups, [float(self.of(ours, theirs)) for ours, theirs in pairs])


class RegurgitationROUGE(TextScore):
    """ROUGE-L recall with stemming, by the package `rouge-score`, averaged by group.

    Args:
        groups: as in `ByRow`.
    """

    of = staticmethod(rouge_l_recall)


class ExactAnswer(TextScore):
    """Share of answers that are the reference, but for case and blanks around them. A word more is a wrong answer.

    Args:
        groups: as in `ByRow`.
    """

    of = staticmethod(is_exact)


class LossAttack(ByRow):
    """The loss attack: how well the mean token loss tells documents that were trained on from others. Computes the AUC.

    0.5 is no leak; 1 a full one; below 0.5, documents are known by an unusually high loss, which leaks as much.
    """

    def __init__(self) -> None:
        super().__init__(("nonmember", "member"))

    def update(self, row_ids: Sequence[str], losses: Sequence[float] | Tensor, member: bool) -> None:
        """Add documents.

        Args:
            row_ids: their names.
            losses: mean token loss of each.
            member: whether the model was trained on them.
        """
        self.add(row_ids, [self.groups[member]] * len(row_ids), losses)

    def compute(self) -> dict[str, float]:
        """`auc`, where both kinds of documents are there."""
        found = self.by_group()
        return {"auc": auc(-found["member"], -found["nonmember"])} if len(found) == 2 else {}


class ChoiceAccuracy(ByRow):
    """Share of questions of which the right choice is the likeliest."""

    def __init__(self) -> None:
        super().__init__(("wrong", "right"))
        self.add_state("questions", [], dist_reduce_fx="cat")
        self._open()

    def _open(self) -> None:
        super()._open()
        self.questions = [self._none(torch.int64)]

    def update(self, row_ids: Sequence[str], questions: Sequence[str], scores: Tensor, right: Sequence[bool]) -> None:
        """Add choices; those of a question may come in any order and from any process.

        Args:
            row_ids: names of the choices.
            questions: question that each belongs to.
            scores: how likely the model finds each.
            right: whether it is the right one.
        """
        self.add(row_ids, [self.groups[r] for r in right], scores)
        self.questions.append(torch.tensor([row_key(q) for q in questions], dtype=torch.int64, device=self.device))

    def compute(self) -> dict[str, float]:
        """`accuracy`, where there is any question; a tie with a wrong choice is no right answer."""
        states: Any = (self.questions, self.group, self.values)
        questions, right, scores = (dim_zero_cat(state).tolist() for state in states)
        best: dict[int, list[float]] = {}
        for question, is_right, score in zip(questions, right, scores, strict=True):
            pair = best.setdefault(question, [-float("inf"), -float("inf")])
            pair[is_right] = max(pair[is_right], score)
        if not best:
            return {}
        return {"accuracy": fmean(float(right > wrong) for wrong, right in best.values())}


def auc(positive: Tensor, negative: Tensor) -> float:
    """Area under the curve: how often a positive scores above a negative, a tie counting half.

    Args:
        positive: scores of one kind, `[P]`.
        negative: scores of the other, `[Q]`.
    """
    both = torch.cat([positive, negative]).double()
    _, where, ties = both.unique(return_inverse=True, return_counts=True)
    ranks = (ties.cumsum(0) - (ties.double() - 1) / 2)[where]  # ties share their mean rank
    p, q = len(positive), len(negative)
    return float((ranks[:p].sum() - p * (p + 1) / 2) / (p * q))
