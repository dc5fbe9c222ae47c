"""Generation with and without directions, and how well formed the texts are: what success is measured on."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lit_reason.rollout.config import SamplingConfig
from lit_reason.rollout.sampler import sample


@dataclass(frozen=True)
class Generated:
    """One continuation of a prompt.

    Attributes:
        prompt: number of the prompt.
        sample: which of its continuations.
        text: what was generated.
        nll: its tokens' summed negative log-likelihood under the model without directions, in nats.
        tokens: number of its tokens.
    """

    prompt: int
    sample: int
    text: str
    nll: float
    tokens: int


def generate(
    lm: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingConfig,
    stop_ids: Sequence[int],
    hook: AbstractContextManager[Any] | None = None,
) -> list[Generated]:
    """Continue prompts, steered or not, and score the continuations with the model as it is.

    Equal settings draw equal random numbers, so that steered and unsteered texts differ by the directions alone.

    Args:
        lm: the language model.
        tokenizer: its tokenizer.
        prompts: token ids.
        sampling: how tokens are drawn.
        stop_ids: tokens that end a text.
        hook: a `SteeringHook`, or a context that several are in; None steers nothing.
    """
    with hook or nullcontext():
        done = sample(lm, tokenizer, prompts, sampling, stop_ids=stop_ids, progress=False)
    scores = continuation_nll(lm, [(prompts[c.prompt_index], c.ids) for c in done], sampling.batch_size)
    return [Generated(c.prompt_index, c.sample_index, c.text, s, len(c.ids)) for c, s in zip(done, scores, strict=True)]


@torch.no_grad()
def continuation_nll(lm: Any, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], batch: int) -> list[float]:
    """Summed negative log-likelihood of each continuation given its prompt, by packed forward passes.

    Args:
        lm: the language model.
        pairs: prompt and continuation, as token ids.
        batch: pairs of one pass.
    """
    found: list[float] = []
    training = lm.training
    lm.eval()
    for at in range(0, len(pairs), batch):
        part = [([*prompt, *rest], len(prompt)) for prompt, rest in pairs[at : at + batch]]
        ids = torch.tensor([i for row, _ in part for i in row], device=lm.device)
        edges = np.cumsum([0, *(len(row) for row, _ in part)])
        positions = torch.cat([torch.arange(len(row), device=lm.device) for row, _ in part])
        index = [int(e) + i - 1 for e, (row, skip) in zip(edges, part, strict=False) for i in range(skip, len(row))]
        owner = [n for n, (row, skip) in enumerate(part) for _ in range(skip, len(row))]
        hidden = lm.hidden(ids, positions, torch.from_numpy(edges.astype(np.int32)))
        where = torch.tensor(index, device=lm.device)
        out = lm.head(hidden[where], ids[where + 1])
        sums = torch.zeros(len(part), dtype=torch.float64)
        found += (sums.index_add_(0, torch.tensor(owner), -out.logp_S.double().cpu())).tolist()
    lm.train(training)
    return found


def perplexity(texts: Sequence[Generated]) -> float:
    """Of all continuations together, token by token."""
    tokens = sum(t.tokens for t in texts)
    return float(np.exp(sum(t.nll for t in texts) / tokens)) if tokens else float("nan")
