"""Held-out pairs, of one kind or several: what a reward is measured on, and never trained on."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lit_reason.data.reading.formats import to_conversation
from lit_reason.data.reading.records import Quarantine, read_records
from lit_reason.data.rendering.render import Renderer
from lit_reason.data.token_row import TokenRow
from lit_reason.errors import RowError, UserError
from lit_reason.metrics.intervals import wilson
from lit_reason.metrics.means import Means
from lit_reason.regimes.irl import watch

Files = str | list[str]


class HeldOutPair(NamedTuple):
    """Two answers to a prompt, of which the first is the better one; `kind` is empty where there is only one."""

    kind: str
    chosen: TokenRow
    rejected: TokenRow


def by_kind(given: Files | Mapping[str, Files] | None) -> dict[str, Files]:
    """Files of pairs by the name of their kind, which is empty where they have none.

    Args:
        given: what the recipe says.
    """
    if isinstance(given, Mapping):
        return dict(given)
    return {"": given} if given else {}


def read_pairs(
    files: Mapping[str, Files], renderer: Renderer, *, max_length: int, limit: int, max_bad_rows: int
) -> list[HeldOutPair]:
    """Pairs in turn of every kind, so that the first of them speak for all; those that cannot be used are told.

    Args:
        files: by kind.
        renderer: of the run.
        max_length: longest conversation in tokens.
        limit: most pairs of a kind.
        max_bad_rows: unusable rows of a kind beyond which reading stops.

    Raises:
        UserError: a kind has no pair.
    """
    lists = []
    for kind, paths in files.items():
        where, rejects = f"data.pairs_file.{kind}" if kind else "data.pairs_file", Quarantine(None, max_bad_rows)
        lists.append(list(itertools.islice(_pairs(kind, paths, renderer, max_length, rejects), limit)))
        if not lists[-1]:
            raise UserError(f"{where} holds no pair of chosen and rejected answers\n{rejects.summary()}")
        if rejects.total:
            rank_zero_info(f"{where}: {rejects.summary()}")
    return [pair for turn in itertools.zip_longest(*lists) for pair in turn if pair is not None]


def _pairs(kind: str, paths: Files, renderer: Renderer, max_length: int, rejects: Quarantine) -> Iterator[HeldOutPair]:
    for row_id, record in read_records(paths, rejects):
        try:
            yield HeldOutPair(kind, *(_side(record, row_id, s, renderer, max_length) for s in ("chosen", "rejected")))
        except RowError as error:
            rejects.add(row_id, error, record)


def _side(record: dict[str, Any], row_id: str, side: str, renderer: Renderer, max_length: int) -> TokenRow:
    if side not in record:
        raise RowError(f"missing field: the row has no '{side}'")
    conversation = to_conversation({**record, "chosen": record[side]}, row_id, format="preference", train_on="last")
    row = renderer.rows(conversation)[-1]
    if len(row) > max_length:
        raise RowError(f"too long: {len(row)} tokens, data.max_length is {max_length}")
    return row


class PairMeter(Means):
    """How often a reward prefers the better answer, and how often length alone does, over all pairs and by kind.

    Args:
        kinds: names; none where pairs are of one kind.
    """

    def __init__(self, kinds: Sequence[str] = ()) -> None:
        endings = ["", *(f"/{kind}" for kind in kinds if kind)]
        super().__init__([name + ending for ending in endings for name in ("pair_accuracy", "length_accuracy")])
        self.seen: Counter[str] = Counter()

    def add(self, pairs: Sequence[HeldOutPair], margin_N: Tensor) -> None:
        """Count some pairs, all of which every process sees.

        Args:
            pairs: N of them.
            margin_N: score of the better answer less that of the other.
        """
        right_N = watch.accuracy(margin_N)
        longer_N = watch.accuracy(right_N.new_tensor([len(p.chosen) - len(p.rejected) for p in pairs]))
        for kind in sorted({"", *(p.kind for p in pairs)}):  # a set has another order in every process
            own = [i for i, p in enumerate(pairs) if kind in ("", p.kind)]
            ending = f"/{kind}" if kind else ""
            self.update("pair_accuracy" + ending, right_N[own])
            self.update("length_accuracy" + ending, longer_N[own])
            self.seen[ending] += len(own)

    def compute(self) -> dict[str, Tensor]:
        """The means, and the 95 % Wilson interval of each accuracy: every process has seen the same pairs."""
        found = super().compute()
        for ending, count in self.seen.items():
            right = found["pair_accuracy" + ending]
            for end, value in zip(("low", "high"), wilson(float(right) * count, count), strict=True):
                found[f"pair_accuracy_{end}{ending}"] = right.new_tensor(value)
        return found

    def reset(self) -> None:
        """Begin anew."""
        super().reset()
        self.seen.clear()
