"""Does a completion end in a loop?"""

from __future__ import annotations

from collections.abc import Sequence


def tail_repeats(ids: Sequence[int], *, copies: int = 4, min_tokens: int = 16) -> bool:
    """Whether a sequence ends in the same piece, again and again.

    True iff for some period p >= 1 the longest stretch at the end in which every token equals the one p
    places before it holds at least `copies` periods and at least `min_tokens` tokens. The last copy may be
    cut off, so a loop that ran into the length limit is found whatever the place of the cut. `min_tokens`
    keeps short innocent runs (`0000`, `....`) out.

    Linear in the length: with z the Z-function of the reversed sequence, the stretch of period p is p + z[p]
    long.

    Args:
        ids: token ids, end token left out.
        copies: how many copies of the piece make a loop.
        min_tokens: shortest looping stretch in tokens.

    Returns:
        Whether the sequence ends in a loop.
    """
    z = _z_function(ids[::-1])
    return any(p + z[p] >= max(copies * p, min_tokens) for p in range(1, len(ids)))


def _z_function(s: Sequence[int]) -> list[int]:
    """z[i] = length of the longest common prefix of s and s[i:]; z[0] = 0 (Gusfield 1997, section 1.4)."""
    n = len(s)
    z = [0] * n
    left = right = 0
    for i in range(1, n):
        length = min(right - i, z[i - left]) if i < right else 0
        while i + length < n and s[length] == s[i + length]:
            length += 1
        z[i] = length
        if i + length > right:
            left, right = i, i + length
    return z
