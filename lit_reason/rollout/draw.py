"""One token per row from a truncated distribution, and the random numbers that say which.

Shape letters: B rows, V vocabulary, N the likeliest of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_NUCLEUS_GUESS = 1024  # a nucleus is rarely larger, and the likeliest few are found much faster than a full order


def draw(
    logits_BV: Tensor, uniforms_B: Tensor, *, temperature: float, top_p: float, top_k: int, min_p: float = 0.0
) -> tuple[Tensor, Tensor]:
    """One token per row: the one at quantile `uniforms_B` of the row's distribution, in vocabulary order.

    Truncation goes as usual: temperature, then the `top_k` likeliest tokens, then the smallest set of
    likeliest tokens whose mass (among those) reaches `top_p` (nucleus sampling, arXiv 1904.09751 section
    3.1). Tokens exactly as likely as the last one kept stay as well, so that ties, common in bfloat16, are
    not broken by chance.

    Args:
        logits_BV: unnormalised log-probabilities.
        uniforms_B: numbers in [0, 1), one per row.
        temperature: softmax temperature, above 0.
        top_p: nucleus mass in (0, 1]; 1 keeps all.
        top_k: number of tokens kept; 0 keeps all.
        min_p: tokens less likely than this share of the likeliest one are left out (arXiv 2407.01082), before the
            nucleus is taken; 0 keeps all.

    Returns:
        `int64 [B]` token ids, and `[B]` the log-probability of each before anything was truncated.
    """
    dtype = exact(logits_BV.device)
    scaled_BV = logits_BV.to(dtype)
    mass_BV = whole_BV = (scaled_BV if temperature == 1 else scaled_BV / temperature).softmax(-1)
    if 0 < top_k < mass_BV.shape[-1]:
        mass_BV = _among(mass_BV, mass_BV.topk(top_k).values[:, -1:])
    if min_p > 0:
        mass_BV = _among(mass_BV, min_p * mass_BV.amax(-1, keepdim=True))
    if top_p < 1:
        mass_BV = mass_BV * (mass_BV >= _nucleus_floor(mass_BV, top_p))
    cdf_BV = mass_BV.cumsum(-1)
    total_B1 = cdf_BV[:, -1:].contiguous()
    drawn_B1 = torch.searchsorted(cdf_BV, uniforms_B.to(dtype)[:, None] * total_B1, right=True)
    # Rounding may put the quantile on the total mass: the last token that has any is meant then. In a row of NaN the
    # token means nothing, but it is one: callers look at the logits.
    last_B1 = torch.searchsorted(cdf_BV, total_B1).clamp(max=cdf_BV.shape[-1] - 1)
    drawn_B1 = drawn_B1.minimum(last_B1)
    return drawn_B1[:, 0], whole_BV.gather(-1, drawn_B1)[:, 0].log()


def exact(device: torch.device) -> torch.dtype:
    """The widest floating-point type of a device: float64, which mps has not.

    Args:
        device: where numbers are drawn.
    """
    return torch.float32 if device.type == "mps" else torch.float64


def _among(mass_BV: Tensor, floor_B1: Tensor) -> Tensor:
    """The distribution among the tokens that are at least so likely."""
    mass_BV = mass_BV * (mass_BV >= floor_B1)
    return mass_BV / mass_BV.sum(-1, keepdim=True)


def _nucleus_floor(mass_BV: Tensor, top_p: float) -> Tensor:
    """Mass of the least likely token of each row's nucleus, `[B, 1]`."""
    vocabulary = mass_BV.shape[-1]
    likeliest = mass_BV.topk(min(_NUCLEUS_GUESS, vocabulary)).values
    floor_B1 = _least_kept(likeliest, top_p)
    if likeliest.shape[-1] < vocabulary:
        wide_B = likeliest.sum(-1) < top_p  # rows whose nucleus is larger than the guess; an order of all is slow
        if bool(wide_B.any()):
            floor_B1[wide_B] = _least_kept(mass_BV[wide_B].sort(-1, descending=True).values, top_p)
    return floor_B1


def _least_kept(likeliest_BN: Tensor, top_p: float) -> Tensor:
    """The last of the likeliest masses before which less than `top_p` is reached, `[B, 1]`."""
    kept_BN = likeliest_BN.cumsum(-1) - likeliest_BN < top_p
    return likeliest_BN.masked_fill(~kept_BN, torch.inf).amin(-1, keepdim=True)


def uniforms(seed: int, key: Sequence[int], count: int) -> np.ndarray:
    """The random numbers of one sequence or turn, one per generated token; a longer call continues a shorter one.

    Args:
        seed: the run's sampling seed, at least 0.
        key: numbers from 0 to 2^32 - 1 that name the sequence or turn, `words_of` its prompt among them.
        count: how many random numbers.

    Returns:
        `float64 [count]` in [0, 1).
    """
    return np.random.default_rng([seed, *key]).random(count)


def words_of(content: bytes) -> tuple[int, ...]:
    """Numbers that stand for some content in the key of a random stream: four words of 32 bits of its hash.

    Args:
        content: a name, or token ids, as bytes.
    """
    digest = hashlib.blake2b(content, digest_size=16).digest()
    return tuple(np.frombuffer(digest, dtype="<u4").tolist())
