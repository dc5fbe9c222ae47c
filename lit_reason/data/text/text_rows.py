"""Documents to token rows. Shape letters: T tokens of a document or of one row."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any, Literal, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from lit_reason.errors import UserError

Layout = Literal["pack", "truncate"]
BATCH = 64  # documents encoded together, in parallel where the tokenizers library may use threads


class TextRow(NamedTuple):
    """A stretch of a document in tokens; all but the first are trained.

    Attributes:
        ids: `[T]` token ids.
        text_bytes: UTF-8 bytes of the text that the trained tokens stand for.
        name: document name, `#k` appended to stretch k > 0.
    """

    ids: np.ndarray
    text_bytes: int
    name: str


class TextRows:
    """Encodes documents and cuts them to rows in which every token of the text is predicted exactly once.

    A document is `start token, text, end token`. A row that continues a document begins with the last token of the
    row before it, which is not trained a second time. Special tokens written out in the text are taken as plain text.

    Args:
        tokenizer: a fast transformers tokenizer with an end token; the start token is its own, else the end token.
        max_length: longest row in tokens.
        layout: `pack` cuts a long document into several rows; `truncate` keeps its first row alone.

    Raises:
        UserError: the tokenizer cannot be used, or rows are too short to predict anything.
    """

    def __init__(self, tokenizer: Any, max_length: int, layout: Layout) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise UserError(
                f"the tokenizer {type(tokenizer).__name__} is not a fast one (a folder with tokenizer.json)"
            )
        if tokenizer.eos_token_id is None:
            raise UserError("the tokenizer has no end token (eos_token), which must close every document")
        if max_length < 2:
            raise UserError(f"data.max_length is {max_length}: a row needs 2 tokens, one to see and one to predict")
        self.end = int(tokenizer.eos_token_id)
        self.start = self.end if tokenizer.bos_token_id is None else int(tokenizer.bos_token_id)
        self.max_length, self.layout = max_length, layout
        self.backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())  # a copy with settings of our own
        self.backend.no_truncation()
        self.backend.no_padding()
        self.backend.encode_special_tokens = True
        self.cut_tokens = 0  # tokens that `truncate` left out

    def __call__(self, documents: Iterable[tuple[str, str]]) -> Iterator[TextRow]:
        """Rows of some documents, in order.

        Args:
            documents: pairs of name and text; empty texts are passed over.
        """
        stream = iter(documents)
        while batch := list(itertools.islice(stream, BATCH)):
            encodings = self.backend.encode_batch([text for _, text in batch], add_special_tokens=False)
            for (name, text), encoding in zip(batch, encodings, strict=True):
                if encoding.ids:
                    yield from self._cut(name, text, encoding)

    def _cut(self, name: str, text: str, encoding: Any) -> Iterator[TextRow]:
        ids_T = np.array([self.start, *encoding.ids, self.end], dtype=np.int32)
        # Character after each token; the end token closes what no token stands for (a normaliser may drop characters).
        ends_T = [0, *(end for _, end in encoding.offsets), len(text)]
        last = len(ids_T) - 1
        for k, begin in enumerate(range(0, last, self.max_length - 1)):
            stop = min(begin + self.max_length, last + 1)
            covered = text[ends_T[begin] : ends_T[stop - 1]]
            yield TextRow(ids_T[begin:stop], len(covered.encode("utf-8", "replace")), f"{name}#{k}" if k else name)
            if self.layout == "truncate":
                self.cut_tokens += last + 1 - stop
                return
