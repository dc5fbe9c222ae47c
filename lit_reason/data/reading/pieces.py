"""A byte stream cut into the pieces that hold one record each, in memory of one piece.

A piece is `(number, bytes, size)`: number of the line or index of the item, both from 1; its bytes, of which
only a beginning is kept once there are more than `limit`; its full size in bytes.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator

Piece = tuple[int, bytes, int]

_CHUNK = 1 << 20
_KEPT = 8000  # bytes kept of a line over the limit, enough for the quarantine file
_STRUCTURE = re.compile(rb'["\[\]{},]')
_IN_STRING = re.compile(rb'(?:[^"\\]++|\\.)*+', re.DOTALL)


class DamagedFile(Exception):
    """The stream as a whole is broken: what follows cannot be told apart."""


def lines(stream: io.BufferedReader, limit: int) -> Iterator[Piece]:
    """Lines that are not blank, without their line ends.

    Args:
        stream: the bytes.
        limit: most bytes of a line that is kept whole.

    Yields:
        One piece a line.
    """
    number = 0
    while line := stream.readline(limit + 2):
        number += 1
        text = line.rstrip(b"\r\n")
        size = len(text)
        if not line.endswith(b"\n") and size > limit:
            text = text[:_KEPT]
            while rest := stream.readline(_CHUNK):
                size += len(rest.rstrip(b"\r\n"))
                if rest.endswith(b"\n"):
                    break
        if text and not text.isspace():
            yield number, text, size


def paragraphs(stream: io.BufferedReader, limit: int) -> Iterator[Piece]:
    """Runs of lines between blank lines; the number is that of the first line.

    Args:
        stream: the bytes.
        limit: most bytes of a paragraph that is kept whole.

    Yields:
        One piece a paragraph.
    """
    start, end, size, held = 0, 0, 0, bytearray()
    for number, line, length in lines(stream, limit):
        if number != end + 1 and held:
            yield start, bytes(held), size
            held.clear()
        if not held:
            start, size = number, length
        else:
            size += 1 + length
            line = b"\n" + line
        if len(held) <= limit:
            held += line
        end = number
    if held:
        yield start, bytes(held), size


def list_items(stream: io.BufferedReader, limit: int) -> Iterator[Piece]:
    """Items of a JSON list, found by brackets and strings alone, so that a malformed item spoils only itself.

    Args:
        stream: the bytes, from the list's opening bracket on.
        limit: most bytes of an item that is kept whole.

    Yields:
        One piece an item.

    Raises:
        DamagedFile: the list is not closed, or something follows it.
    """
    scanner, index, size, item = _ListScanner(), 0, 0, bytearray()
    while chunk := stream.read1(_CHUNK):
        start = 0
        for cut, mark in scanner.marks(chunk):
            if index:
                size += cut - start
                item += chunk[start:cut]
                if mark == b"," or item.strip():
                    yield index, bytes(item if size <= limit else item[:_KEPT]), size
                item.clear()
            index, size, start = index + 1, 0, cut + 1
            if scanner.depth == 0:
                _check_end(stream, chunk[start:], index - 1)
                return
        size += len(chunk) - start
        if len(item) <= limit:
            item += chunk[start:]
    raise DamagedFile(f"the list is not closed: it was cut short in item {index}, or a bracket is missing there")


def _check_end(stream: io.BufferedReader, rest: bytes, items: int) -> None:
    """Raises DamagedFile where anything but white space follows the list."""
    while rest.isspace() or not rest:
        rest = stream.read1(_CHUNK)
        if not rest:
            return
    raise DamagedFile(f"the list ends after item {items}, but more text follows it")


class _ListScanner:
    """Finds where the outermost list opens, separates and closes, across the borders of chunks.

    Attributes:
        depth: number of brackets and braces that are open.
    """

    def __init__(self) -> None:
        self.depth = 0
        self._in_string = False
        self._escaped = False  # the last chunk ended in the backslash of an escape

    def marks(self, chunk: bytes) -> Iterator[tuple[int, bytes]]:
        """Position and character of each bracket and comma of the outermost list in the next chunk."""
        at = int(self._escaped)
        self._escaped = False
        while at < len(chunk):
            if self._in_string:
                # It matches always, if only the empty text.
                at = _IN_STRING.match(chunk, at).end()  # type: ignore[union-attr]
                if at < len(chunk):  # at a quote, or at a backslash with nothing behind it
                    self._escaped = self._in_string = chunk[at : at + 1] == b"\\"
                    at += 1
                continue
            token = _STRUCTURE.search(chunk, at)
            if token is None:
                return
            at, mark = token.end(), token[0]
            if mark == b'"':
                self._in_string = True
            elif mark == b",":
                if self.depth == 1:
                    yield token.start(), mark
            elif mark in b"[{":
                self.depth += 1
                if self.depth == 1:
                    yield token.start(), mark
            else:
                self.depth -= 1
                if self.depth == 0:
                    yield token.start(), mark
