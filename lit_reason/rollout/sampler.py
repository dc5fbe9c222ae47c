"""Batched generation with a KV cache, reproducible sequence by sequence.

`transformers` runs the model; this file decides what goes into one batch, draws the tokens, and cuts the
result at its end token. Shape letters: B sequences of one batch, P padded prompt length, V vocabulary.

What is reproducible. Every sequence has a random stream of its own, a function of (seed, prompt token ids,
sample index) alone: the draws do not change with batch size, with the other prompts, with their order, or
with the process that runs them, and torch's global random state is neither read nor written. The *logits* of
a sequence may differ in rounding between batch shapes, so two batch sizes agree unless a draw falls within
rounding distance of the border between two tokens (for greedy: unless two tokens tie to rounding).
A prompt that is given n times counts as one prompt with n times as many samples, so its copies differ.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria
from transformers.generation.stopping_criteria import StoppingCriteriaList

from lit_reason.errors import UserError
from lit_reason.rollout.broken_output import broken_output
from lit_reason.rollout.config import SamplingConfig
from lit_reason.rollout.draw import draw, exact, uniforms, words_of


class HasModel(Protocol):
    """What the sampler needs of a language model."""

    @property
    def hf(self) -> Any:
        """A `PreTrainedModel` or a `PeftModel` with a `generate` method."""


@dataclass(frozen=True)
class Completion:
    """One sampled answer to one prompt.

    Attributes:
        prompt_index: position of the prompt in the list given to `sample`.
        sample_index: which of the prompt's samples this is, from 0.
        ids: generated token ids up to and including the first end token; nothing after it.
        text: `ids` decoded without end and padding tokens. Other special tokens, think markers among them,
            stay.
        closed_eos: an end token was reached before the length limit.
    """

    prompt_index: int
    sample_index: int
    ids: list[int]
    text: str
    closed_eos: bool


@dataclass(frozen=True)
class _Request:
    """One sequence to generate: `limit` new tokens at most, by the random stream of this key."""

    prompt_index: int
    sample_index: int
    ids: Sequence[int]
    limit: int
    key: tuple[int, ...]  # which of the prompt's samples, and the prompt


def sample(
    lm: HasModel,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    config: SamplingConfig,
    *,
    stop_ids: Sequence[int],
    progress: bool = True,
) -> list[Completion]:
    """Generate `config.samples` completions for each prompt.

    The model is in eval mode while it generates and afterwards in exactly the mode it was in before; a
    `generation_config.json` that came with the model has no say.

    Args:
        lm: the model, as `lm.hf`.
        tokenizer: gives the padding token and decodes.
        prompts: token ids of each prompt, generation prompt included.
        config: how to sample; temperature 0 is greedy.
        stop_ids: end tokens; generation of a sequence ends with the first of them.
        progress: show a progress bar, in tokens (its total is an upper bound that shrinks).

    Returns:
        `len(prompts) * config.samples` completions, ordered by prompt and then by sample.

    Raises:
        UserError: a setting is out of range, there is no end token, a prompt is empty or leaves no room in
            the model's context, or the model's output is NaN or infinite. A prompt that leaves too little
            room is generated up to the end of the context, with a warning.
    """
    _check(config, stop_ids)
    batches = list(_batches(_requests(prompts, config, _context_length(lm.hf)), config.batch_size))
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else stop_ids[0]
    done: dict[tuple[int, int], Completion] = {}
    bar = tqdm(
        total=sum(r.limit for batch in batches for r in batch),
        desc="generate",
        unit="tok",
        unit_scale=True,
        leave=False,
        disable=not progress,
    )
    # inference_mode(False): Lightning validates in inference mode, and a buffer that the model fills while it
    # generates must stay usable in the backward pass of the next training step.
    with torch.inference_mode(False), torch.no_grad(), generating(lm.hf), bar:
        for batch in batches:
            for request, ids in zip(batch, _generate(lm.hf, batch, config, stop_ids, pad_id, bar), strict=True):
                done[request.prompt_index, request.sample_index] = _completion(
                    request, ids, tokenizer, stop_ids, pad_id
                )
    return [done[p, s] for p in range(len(prompts)) for s in range(config.samples)]


class _Numbers(LogitsProcessor):
    """Stops at logits that are no numbers, and names the sequence."""

    def __init__(self, hf: Any, batch: Sequence[_Request], prompt_length: int) -> None:
        self.hf, self.batch, self.prompt_length = hf, batch, prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        sound_B = scores.amax(-1).isfinite()
        if not bool(sound_B.all()):
            request = self.batch[int(sound_B.int().argmin())]
            token = input_ids.shape[1] - self.prompt_length
            where = f"prompt {request.prompt_index}, sample {request.sample_index}, token {token}"
            raise broken_output(self.hf, where, scores.dtype)
        return scores


class _Draw(LogitsProcessor):
    """Draws the next token and leaves it as the only one possible, so that greedy search picks it."""

    def __init__(self, uniforms_BN: Tensor, prompt_length: int, config: SamplingConfig) -> None:
        self.uniforms_BN = uniforms_BN
        self.prompt_length = prompt_length
        self.config = config

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        c = self.config
        step_B = self.uniforms_BN[:, input_ids.shape[1] - self.prompt_length]
        chosen_B, _ = draw(scores, step_B, temperature=c.temperature, top_p=c.top_p, top_k=c.top_k, min_p=c.min_p)
        return torch.full_like(scores, -torch.inf).scatter(-1, chosen_B[:, None], 0.0)


class _Tick(StoppingCriteria):
    """Moves the progress bar by one token a sequence; never stops anything."""

    def __init__(self, bar: tqdm) -> None:
        self.bar = bar
        self.steps = 0

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        self.steps += 1
        self.bar.update(len(input_ids))
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def _generate(
    hf: Any,
    batch: Sequence[_Request],
    config: SamplingConfig,
    stop_ids: Sequence[int],
    pad_id: int,
    bar: tqdm,
) -> list[list[int]]:
    """Generated ids of each sequence of one batch, cut after the first end token."""
    device = hf.get_input_embeddings().weight.device
    width = max(len(r.ids) for r in batch)
    limit = batch[0].limit
    ids_BP = torch.full((len(batch), width), pad_id, dtype=torch.long)
    mask_BP = torch.zeros((len(batch), width), dtype=torch.long)
    for row, request in enumerate(batch):
        ids_BP[row, width - len(request.ids) :] = torch.as_tensor(request.ids, dtype=torch.long)
        mask_BP[row, width - len(request.ids) :] = 1
    processors = LogitsProcessorList([_Numbers(hf, batch, width)])
    if config.temperature > 0:
        table = np.stack([uniforms(config.seed, r.key, limit) for r in batch])
        table_BN = torch.from_numpy(table).to(exact(device))
        processors.append(_Draw(table_BN.to(device), width, config))
    tick = _Tick(bar)
    out_BT = hf.generate(
        input_ids=ids_BP.to(device),
        attention_mask=mask_BP.to(device),
        generation_config=GenerationConfig(
            max_new_tokens=limit,
            do_sample=False,
            num_beams=1,
            use_cache=True,
            eos_token_id=list(stop_ids),
            pad_token_id=pad_id,
        ),
        logits_processor=processors,
        stopping_criteria=StoppingCriteriaList([tick]),
    )
    bar.total -= len(batch) * (limit - tick.steps)
    bar.refresh()
    return [_cut(row, stop_ids) for row in out_BT[:, width:].tolist()]


def _cut(ids: list[int], stop_ids: Sequence[int]) -> list[int]:
    """`ids` up to and including the first end token."""
    end = next((i for i, token in enumerate(ids) if token in stop_ids), len(ids))
    return ids[: end + 1]


def _completion(request: _Request, ids: list[int], tokenizer: Any, stop_ids: Sequence[int], pad_id: int) -> Completion:
    silent = {*stop_ids, pad_id}
    text = tokenizer.decode(
        [token for token in ids if token not in silent],
        skip_special_tokens=False,  # think markers are special tokens in some vocabularies, and must be seen
        clean_up_tokenization_spaces=False,
    )
    closed = bool(ids) and ids[-1] in stop_ids
    return Completion(request.prompt_index, request.sample_index, ids, text, closed)


def _requests(prompts: Sequence[Sequence[int]], config: SamplingConfig, context: int | None) -> list[_Request]:
    """Every (prompt, sample) pair with its own limit of new tokens and its random stream."""
    requests: list[_Request] = []
    seen: Counter[tuple[int, ...]] = Counter()
    short = 0
    for p, ids in enumerate(prompts):
        if not len(ids):
            raise UserError(f"prompt {p} is empty: there is nothing to continue")
        room = config.max_new_tokens if context is None else context - len(ids)
        if room < 1:
            raise UserError(
                f"prompt {p} has {len(ids)} tokens and the model's context is {context}: no room for an "
                "answer. Leave out the prompt, or raise max_position_embeddings in model.overrides"
            )
        short += room < config.max_new_tokens
        copies = seen[tuple(ids)]
        seen[tuple(ids)] += 1
        limit, prompt = min(room, config.max_new_tokens), words_of(np.asarray(ids, dtype="<i8").tobytes())
        requests += [_Request(p, s, ids, limit, (copies * config.samples + s, *prompt)) for s in range(config.samples)]
    if short:
        warnings.warn(
            f"{short} of {len(prompts)} prompts leave less than max_new_tokens={config.max_new_tokens} tokens "
            f"of the model's context ({context}); their completions end where the context ends",
            stacklevel=3,
        )
    return requests


def _batches(requests: Sequence[_Request], size: int) -> Iterator[list[_Request]]:
    """Batches of similar prompt length, longest first: what does not fit in memory fails at once.

    All sequences of a batch have the same limit, so no sequence is cut short by a longer neighbour.
    """
    by_length = sorted(requests, key=lambda r: -len(r.ids))
    for _, group in groupby(by_length, key=lambda r: r.limit):
        same = list(group)
        for start in range(0, len(same), size):
            yield same[start : start + size]


def _context_length(hf: Any) -> int | None:
    """Largest number of positions the model's config allows; None where it does not say."""
    config = hf.config.get_text_config() if hasattr(hf.config, "get_text_config") else hf.config
    return getattr(config, "max_position_embeddings", None)


@contextmanager
def generating(hf: Any) -> Iterator[None]:
    """Eval mode and neutral generation defaults; every module's own mode and defaults come back afterwards.

    Eval mode also switches off gradient checkpointing, which would forbid the KV cache.

    Args:
        hf: the transformers model, or a peft model around one.
    """
    modes = [(module, module.training) for module in hf.modules()]
    # An adapter and the model inside it each hold one. generate() takes what its argument leaves open from
    # there.
    defaults = [(m, m.generation_config) for m in hf.modules() if "generation_config" in vars(m)]
    hf.eval()
    for module, _ in defaults:
        module.generation_config = GenerationConfig()
    try:
        yield
    finally:
        for module, default in defaults:
            module.generation_config = default
        for module, training in modes:
            module.training = training


def _check(config: SamplingConfig, stop_ids: Sequence[int]) -> None:
    """Settings that no generation can honour."""
    allowed = {
        "max_new_tokens": (config.max_new_tokens >= 1, "at least 1"),
        "temperature": (config.temperature >= 0, "at least 0 (0 is greedy)"),
        "top_p": (0 < config.top_p <= 1, "in (0, 1]"),
        "top_k": (config.top_k >= 0, "at least 0 (0 keeps all)"),
        "min_p": (0 <= config.min_p <= 1, "in [0, 1] (0 keeps all)"),
        "samples": (config.samples >= 1, "at least 1"),
        "batch_size": (config.batch_size >= 1, "at least 1"),
        "seed": (config.seed >= 0, "at least 0"),
    }
    for name, (fine, rule) in allowed.items():
        if not fine:
            raise UserError(f"sampling.{name} is {getattr(config, name)}; it must be {rule}")
    if not stop_ids:
        raise UserError("no end token: the tokenizer names none (eos_token), so a completion could never end")
