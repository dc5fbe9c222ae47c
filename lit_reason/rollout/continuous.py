"""Turns by the continuous batching of transformers: paged keys and values, rows that join and leave at every token.

It keeps no cache between turns, and draws of a row depend on which rows it runs with. Its log-probabilities are those
of the distribution it drew from, which is the policy's own where nothing is truncated and the arithmetic is in float32;
otherwise the trainer's forward pass scores the tokens, and the ledger says so.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import GenerationConfig

from lit_reason.errors import UserError
from lit_reason.models.language_model import LanguageModel
from lit_reason.rollout.backend import scores
from lit_reason.rollout.broken_output import broken_output
from lit_reason.rollout.config import SamplingConfig
from lit_reason.rollout.sampler import generating
from lit_reason.rollout.whole_prefix import Request, WholePrefix

_PAGE = 64  # tokens of a block of keys and values on a CPU, where nothing sizes the cache by itself
_SILENCE_S = 600.0  # without a token from any row, the generation has failed


class ContinuousBatching(WholePrefix):
    """Turns by `transformers`' continuous batching, with the trainer's own weights.

    Args:
        lm: the model that is being trained.
        tokenizer: decodes, and nothing else.
        sampling: temperature, top_p, top_k and seed are read.
        stop_ids: tokens that end a turn.

    Raises:
        UserError: this transformers has no continuous batching, weights lie in shards, or min_p is asked for.
    """

    sampler = "continuous"

    def __init__(self, lm: LanguageModel, tokenizer: Any, sampling: SamplingConfig, stop_ids: Sequence[int]) -> None:
        super().__init__(lm, tokenizer, sampling, stop_ids)
        if not hasattr(lm.base, "continuous_batching_context_manager"):
            raise UserError("dialogue.backend continuous: this version of transformers has no continuous batching")
        if hasattr(lm.base, "run_backbone"):
            raise UserError("dialogue.backend continuous cannot run weights in shards (fsdp2); use own")
        if sampling.min_p > 0:
            raise UserError("dialogue.backend continuous has no min_p; set sampling.min_p to 0, or use own")
        truncated = sampling.temperature > 0 and (sampling.top_p < 1 or sampling.top_k > 0)
        exact = lm.base.dtype == torch.float32 and not truncated
        self.scorer = "sampler" if exact and "return_logprobs" in _settings() else "trainer"

    def complete(self, requests: Sequence[Request], stops: Sequence[str]) -> list[tuple[list[int], list[float]]]:
        """Write a turn for each request.

        Args:
            requests: at least one.
            stops: texts that end a turn; a row that wrote one is cancelled.

        Raises:
            UserError: the model's output is NaN or infinite, a request failed, or the generation stopped.
        """
        devices = [self.lm.device] if self.lm.device.type == "cuda" else []
        with torch.random.fork_rng(devices):  # it seeds the global state
            torch.manual_seed(requests[0].seed)
            found = self._generate(requests, stops)
        if self.scorer == "trainer":
            written = [([*request.ids, *ids], len(ids)) for request, (ids, _) in zip(requests, found, strict=True)]
            by_trainer = scores(self.lm, written, self.sampling.temperature)
            found = [(ids, logprobs) for (ids, _), logprobs in zip(found, by_trainer, strict=True)]
        for request, (_, logprobs) in zip(requests, found, strict=True):
            broken = next((n for n, logprob in enumerate(logprobs) if not math.isfinite(logprob)), None)
            if broken is not None:  # the trainer's one pass over a turn spreads NaN to tokens before it
                token = f", token {broken}" if self.scorer == "sampler" else ""
                raise broken_output(self.lm.hf, request.where + token, self.lm.base.dtype)
        return found

    def _generate(self, requests: Sequence[Request], stops: Sequence[str]) -> list[tuple[list[int], list[float]]]:
        out: list[tuple[list[int], list[float]]] = [([], [])] * len(requests)
        live = dict.fromkeys(range(len(requests)))
        looked = [0] * len(requests)
        last, failed = time.monotonic(), ""
        with generating(self.lm.hf), self._manager(requests) as manager:
            for r, request in enumerate(requests):
                manager.add_request(
                    request.ids,
                    request_id=str(r),
                    max_new_tokens=request.limit,
                    streaming=bool(stops),
                    eos_token_id=sorted(self.ends.stop_ids),
                )
            while live:
                result = manager.get_result(timeout=1.0)
                if result is None:
                    if manager.is_running() and time.monotonic() - last <= _SILENCE_S:
                        continue
                    failed = failed or "the generation stopped before all turns ended"
                    break
                last, r = time.monotonic(), int(result.request_id)
                if r not in live:
                    continue  # a token that was under way when its row was cancelled
                out[r] = (list(result.generated_tokens), list(result.logprobs))
                if result.error is not None:
                    failed = f"{requests[r].where}: {result.error}"
                    del live[r]
                    continue
                ended = bool(stops) and self.ends.first(out[r][0], stops, looked[r]) is not None
                looked[r] = len(out[r][0])
                if ended and not result.is_finished():
                    manager.cancel_request(result.request_id)
                if ended or result.is_finished():
                    del live[r]
        if failed:
            raise self._failure(requests, [ids for ids, _ in out], failed)
        return out

    def _failure(self, requests: Sequence[Request], written: Sequence[list[int]], said: str) -> UserError:
        """Why a generation failed: nothing can be drawn from NaN, and the trainer's model says where that would be."""
        for request, ids in zip(requests, written, strict=True):
            begun = [*request.ids, *ids, request.ids[-1]]  # any token stands for the one to come
            if not math.isfinite(scores(self.lm, [(begun, 1)], self.sampling.temperature)[0][0]):
                return broken_output(self.lm.hf, f"{request.where}, token {len(ids)}", self.lm.base.dtype)
        return UserError(f"dialogue.backend continuous: {said}")

    @contextmanager
    def _manager(self, requests: Sequence[Request]) -> Iterator[Any]:
        """The generation, under an attention that it knows; the trainer's comes back afterwards."""
        from transformers import ContinuousBatchingConfig

        s, base = self.sampling, self.lm.base
        warp = {"temperature": s.temperature, "top_p": s.top_p, "top_k": s.top_k} if s.temperature > 0 else {}
        generation = GenerationConfig(
            do_sample=s.temperature > 0,
            max_new_tokens=max(r.limit for r in requests),
            eos_token_id=sorted(self.ends.stop_ids),
            **warp,
        )
        wanted: dict[str, Any] = {"return_logprobs": self.scorer == "sampler", "seed": requests[0].seed}
        if self.lm.device.type != "cuda":
            blocks = sum(-(-(len(r.ids) + r.limit) // _PAGE) + 1 for r in requests)
            tokens = max(len(requests), *(len(r.ids) for r in requests))
            wanted |= {"page_size": _PAGE, "block_size": _PAGE, "num_blocks": blocks, "max_batch_tokens": tokens}
            if "page_size" in _settings():
                del wanted["block_size"]
        config = ContinuousBatchingConfig(**{k: v for k, v in wanted.items() if k in _settings()})
        before = base.config._attn_implementation
        base.set_attn_implementation("sdpa" if getattr(base, "_supports_sdpa", False) else "paged|eager")
        try:
            with base.continuous_batching_context_manager(  # type: ignore[operator]
                generation_config=generation,
                continuous_batching_config=config,
                timeout=30,
                warmup=self.lm.device.type == "cuda",
            ) as manager:
                yield manager
        finally:
            base.set_attn_implementation(before)


def _settings() -> set[str]:
    """Settings that this version of transformers has."""
    from transformers import ContinuousBatchingConfig

    return {field.name for field in dataclasses.fields(ContinuousBatchingConfig)}
