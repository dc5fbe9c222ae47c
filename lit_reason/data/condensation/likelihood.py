"""Token pruning by a causal language model's own likelihoods (strategy `token`).

This is *not* TokenSkip: that method scores tokens with a classifier trained for the purpose (LLMLingua-2).
Here a token is worth keeping when a plain causal model did not expect it. Kept tokens leave fragments, not
sentences.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from lit_reason.data.condensation.selection import exact
from lit_reason.data.conversation import Trace

if TYPE_CHECKING:
    from torch import Tensor

Spans = list[tuple[int, int, float]]
Scorer = Callable[[str, str], Spans]
"""`scorer(prefix_text, body)` gives for each token of `body` its start and end offset and its negative
log-likelihood."""


def prune_tokens(trace: Trace, spans: Spans, tau: float | Fraction, whole_tail: int = 0) -> Trace:
    """Keep the `ceil(tau T)` tokens of a trace that were least expected, in their order.

    Text between two spans goes with the earlier one, tokens that share a start are one token, and of equally
    expected tokens the first stays.

    Args:
        trace: the full trace.
        spans: `(start, end, nll)` over `trace.text`.
        tau: share of tokens kept.
        whole_tail: this many thoughts at the end stay complete.

    Returns:
        The thoughts that still have a token, each with those it kept.
    """
    text = trace.text
    worth: dict[int, float] = {}
    for start, _, nll in spans:
        start = min(max(start, 0), len(text))
        worth[start] = max(nll, worth.get(start, -math.inf))
    if not worth:
        return trace
    worth[0] = worth.pop(min(worth))
    starts = sorted(worth)
    kept = set(sorted(starts, key=lambda s: (-worth[s], s))[: math.ceil(exact(tau) * len(starts))])
    pieces = [(a, b) for a, b in zip(starts, [*starts[1:], len(text)], strict=True) if a in kept]
    return _regroup(trace, pieces, whole_tail)


def _regroup(trace: Trace, pieces: Sequence[tuple[int, int]], whole_tail: int) -> Trace:
    """The kept pieces of text, put back into the thoughts they came from."""
    text = trace.text
    thoughts, origin = [], []
    begin, at = 0, 0
    for index, (thought, place) in enumerate(zip(trace.thoughts, trace.origin, strict=True)):
        end = begin + len(thought)
        parts = []
        while at < len(pieces) and pieces[at][0] < end:
            parts.append(text[max(pieces[at][0], begin) : min(pieces[at][1], end)])
            if pieces[at][1] > end:
                break  # the token reaches into the next thought
            at += 1
        left = thought if index >= len(trace.thoughts) - whole_tail else "".join(parts)
        if left:
            thoughts.append(left)
            origin.append(place)
        begin = end
    return Trace(tuple(thoughts), tuple(origin), trace.total)


def load_scorer(path: str, window: int = 1024) -> Scorer:
    """A scorer from a model folder, GGUF file or hub id. Imports torch.

    Args:
        path: the model.
        window: tokens the model sees at a time; longer texts are read in windows that overlap by half.

    Returns:
        A `Scorer`.
    """
    import torch

    from lit_reason.models.config import ModelConfig
    from lit_reason.models.loading import load_model, load_tokenizer

    config = ModelConfig(path=path)
    tokenizer: Any = load_tokenizer(config)
    model: Any = load_model(config)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device)
    limit = min(window, getattr(model.config, "max_position_embeddings", None) or window)

    @torch.inference_mode()
    def score(prefix_text: str, body: str) -> Spans:
        before = tokenizer(prefix_text, add_special_tokens=True)["input_ids"] if prefix_text else []
        if not before and tokenizer.bos_token_id is not None:
            before = [tokenizer.bos_token_id]
        coded = tokenizer(body, add_special_tokens=False, return_offsets_mapping=True)
        ids = torch.tensor([*before, *coded["input_ids"]], device=device)
        nll = window_nll(lambda part: model(part[None]).logits[0], ids, limit)[len(before) :]
        return [(a, b, float(x)) for (a, b), x in zip(coded["offset_mapping"], nll, strict=True)]

    return score


def window_nll(logits_of: Callable[[Tensor], Tensor], ids_T: Tensor, limit: int) -> Tensor:
    """Negative log-likelihood of each token given those before it, read in half-overlapping windows.

    Args:
        logits_of: maps ids `[W]` to logits `[W, V]`.
        ids_T: token ids `[T]`.
        limit: largest W, at least 2.

    Returns:
        `float32 [T]`; the first value is 0, since nothing stands before it.
    """
    import torch

    nll_T = torch.zeros(len(ids_T))
    done, start = 1, 0
    while done < len(ids_T):
        part_W = ids_T[start : start + limit]
        logits_WV = logits_of(part_W)[:-1].float()
        logp_W = logits_WV.log_softmax(-1).gather(1, part_W[1:, None])[:, 0]
        fresh = done - start - 1  # targets already scored with more context
        nll_T[done : start + len(part_W)] = -logp_W[fresh:].cpu()
        done = start + len(part_W)
        start = max(done - max(limit // 2, 1), start + 1)
    return nll_T
