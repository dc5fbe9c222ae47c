"""BM25 over the passages of a corpus (extra `search`)."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from lit_reason.data.reading.records import read_every_record
from lit_reason.errors import UserError, did_you_mean
from lit_reason.tasks.world import Passage

_WORD = re.compile(r"\w+")


class Index:
    """Finds passages by words, best first; equal scores in the order of the corpus.

    Args:
        passages: the corpus.

    Raises:
        UserError: there is no passage, two have one name, or bm25s is not installed.
    """

    def __init__(self, passages: Sequence[Passage]) -> None:
        try:
            import bm25s
        except ImportError as error:
            raise UserError("searching needs the bm25s package: pip install 'lit-reason[search]'") from error
        self.passages = tuple(passages)
        self.places = {p.id: n for n, p in enumerate(self.passages)}
        if not self.passages:
            raise UserError("the corpus holds no passage")
        if len(self.places) < len(self.passages):
            twice = next(p.id for n, p in enumerate(self.passages) if self.places[p.id] != n)
            raise UserError(f"the corpus has two passages with the id '{twice}'")
        self._bm25 = bm25s.BM25(k1=1.5, b=0.75, method="lucene")
        self._bm25.index([words(p.text) for p in self.passages], show_progress=False)

    def search(self, query: str, most: int) -> list[Passage]:
        """The best passages for some words.

        Args:
            query: the words.
            most: passages to return.

        Returns:
            At most so many; none that has no word of the query.
        """
        asked = words(query)
        if not asked:
            return []
        score = self._bm25.get_scores(asked)
        best = np.argsort(-score, kind="stable")[:most]
        return [self.passages[i] for i in best if score[i] > 0]

    def check_ids(self, ids: Sequence[str]) -> None:
        """Refuse names of passages that are not in the corpus.

        Args:
            ids: names.

        Raises:
            UserError: one is not there.
        """
        for name in ids:
            if name not in self.places:
                raise UserError(f"the corpus has no passage with the id '{name}'{did_you_mean(name, self.places)}")


def words(text: str) -> list[str]:
    """The words of a text as the index counts them: letters and digits, lower case, nothing left out.

    Args:
        text: any text.
    """
    return _WORD.findall(text.lower())


def read_passages(path: str) -> list[Passage]:
    """A corpus from a file of records with `text`, and `id` and `title` where there are any.

    Args:
        path: JSONL, or any other kind of file that data files may be.

    Returns:
        The passages; a title becomes the beginning of its text, a missing id the number of the row.

    Raises:
        UserError: a record has no text, or the file cannot be read.
    """
    found = []
    for row_id, record in read_every_record(path):
        text = record.get("text")
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"corpus {path}, row {row_id}: a passage needs a field 'text' that is not empty")
        title = record.get("title")
        found.append(Passage(str(record.get("id", row_id)), f"{title}. {text}" if title else text))
    return found
