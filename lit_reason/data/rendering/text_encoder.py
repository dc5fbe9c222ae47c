"""Text to token ids, such that training ids begin exactly as the ids that generation is prompted with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from lit_reason.errors import RowError, UserError

_CACHED_TAIL = 256  # characters; prompts mostly end in the same few words, longer ends are encoded anew

_ANCHORS = ("\n", "a", ".")  # texts to encode a piece behind; the first that does not melt into it is used


class Encoded(NamedTuple):
    """Tokens of a text.

    Attributes:
        ids: `int64 [T]` token ids.
        start: `int64 [T]` first character of each token, never decreasing.
        end: `int64 [T]` character after its last.
    """

    ids: np.ndarray
    start: np.ndarray
    end: np.ndarray


class TextEncoder:
    """Encodes texts and looks after the borders between prompt and answer.

    Args:
        tokenizer: a fast tokenizer (one that reports offsets).

    Raises:
        UserError: the tokenizer is not a fast one.
    """

    def __init__(self, tokenizer: Any) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise UserError(
                f"the tokenizer {type(tokenizer).__name__} reports no character offsets; "
                "a fast one is needed (a folder with tokenizer.json)"
            )
        self._backend = tokenizer.backend_tokenizer
        self._splitting = {i for i, token in tokenizer.added_tokens_decoder.items() if not token.normalized}
        self._tails: dict[str, np.ndarray] = {}
        # A tokenizer that puts a blank before every text must not do so before a piece of one.
        self._anchored = self._puts_blank()

    def _puts_blank(self) -> bool:
        try:
            apart = np.concatenate([self.encode("\n").ids, self.encode("a").ids])
            return not np.array_equal(self.encode("\na").ids, apart)
        except RowError:  # a toy vocabulary without these letters
            return False

    def encode(self, text: str) -> Encoded:
        """Token ids and offsets of a whole text; no special token is added.

        Args:
            text: any text; special tokens written out in it become those tokens.

        Raises:
            RowError: the text cannot be encoded (half of a surrogate pair).
        """
        if self._backend.truncation is not None:
            self._backend.no_truncation()
        if self._backend.padding is not None:
            self._backend.no_padding()
        try:
            encoding = self._backend.encode(text, add_special_tokens=False)
        except Exception as error:  # the tokenizers library raises no narrower class
            bad = next((i for i, c in enumerate(text) if "\ud800" <= c <= "\udfff"), None)
            if bad is None:
                raise RowError(f"the tokenizer cannot encode this text: {error}") from error
            near = text[max(0, bad - 20) : bad + 20].encode("ascii", "backslashreplace").decode()
            raise RowError(f"the text holds half of a surrogate pair near '{near}'") from error
        offsets = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
        return Encoded(np.array(encoding.ids, dtype=np.int64), offsets[:, 0], offsets[:, 1])

    def encode_piece(self, text: str) -> Encoded:
        """Tokens of a text that continues another one.

        Args:
            text: the piece; offsets count from its start.
        """
        for anchor in _ANCHORS if self._anchored and text else ():
            before, whole = self.encode(anchor).ids, self.encode(anchor + text)
            rest, width = slice(len(before), None), len(anchor)
            apart = (whole.end[: len(before)] <= width).all() and (whole.start[rest] >= width).all()
            if apart and np.array_equal(whole.ids[: len(before)], before):
                return Encoded(whole.ids[rest], whole.start[rest] - width, whole.end[rest] - width)
        return self.encode(text)

    def encode_at(self, text: str, borders: Sequence[int]) -> tuple[Encoded, bool]:
        """Tokens of a text in which generation would start at each of some borders.

        Args:
            text: prompt and answers.
            borders: increasing character positions; `text[:border]` is what generation is prompted with.

        Returns:
            Tokens, and whether the tokens before each border are those of `text[:border]` encoded alone. If
            they are not and there is a single border, the text is encoded in two pieces there and the answer
            is True.
        """
        whole = self.encode(text)
        if all(self._agrees(text, whole, border) for border in borders):
            return whole, True
        if len(borders) > 1:
            return whole, False
        border = borders[0]
        prompt, rest = self.encode(text[:border]), self.encode_piece(text[border:])
        return Encoded(*(np.concatenate(p) for p in zip(prompt, _shift(rest, border), strict=True))), True

    def _agrees(self, text: str, whole: Encoded, border: int) -> bool:
        """Whether the tokens of `text[:border]` alone are the first tokens of the whole text.

        Special tokens split a text before anything else is done with it, so what stands before the last of
        them has the same tokens in both; only the stretch from there to the border is compared.
        """
        count = int(np.searchsorted(whole.start, border))
        if count and whole.end[count - 1] > border:
            return False
        first = next((j for j in range(count - 1, -1, -1) if int(whole.ids[j]) in self._splitting), 0)
        tail = text[int(whole.start[first]) if first else 0 : border]
        return np.array_equal(whole.ids[first:count], self._tail(tail))

    def _tail(self, tail: str) -> np.ndarray:
        known = self._tails.get(tail)
        if known is None:
            known = self.encode(tail).ids
            if len(tail) <= _CACHED_TAIL and len(self._tails) < 4096:
                self._tails[tail] = known
        return known


def _shift(piece: Encoded, by: int) -> Encoded:
    return Encoded(piece.ids, piece.start + by, piece.end + by)
