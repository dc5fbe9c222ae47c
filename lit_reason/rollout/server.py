"""Turns by an OpenAI-compatible server such as vLLM: token ids go in, token ids and log-probabilities come out.

Every turn is a request to `/v1/completions` whose prompt is the list of all ids so far. What comes back is checked
before it is believed: ids and not text, a finite log-probability for each, the prompt as it was sent, and, where the
server is said to hold the trainer's present weights, log-probabilities that the trainer itself would give.

The weights. With `sync: adapter` the adapter is written before each round into a folder that both sides see and loaded
under a name that holds its version and the hash of its weights: a server that has something else answers that it knows
no such model. With `sync: none` the server's weights are version 0 for ever, and the run stops once they are further
behind than `most_lag` allows.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from lit_reason.errors import UserError
from lit_reason.models.language_model import LanguageModel
from lit_reason.rollout.backend import Turn, scores
from lit_reason.rollout.config import BackendConfig, SamplingConfig
from lit_reason.rollout.whole_prefix import Request, WholePrefix

_PAUSES_S = (1.0, 5.0)  # before another try; a server that fails once more has failed
_COMPARED = 16  # rows of a round whose log-probabilities are compared with the trainer's
_SHOWN = 300  # characters of a server's answer in an error


class CompletionServer(WholePrefix):
    """Turns by a server.

    Args:
        lm: the trainer's model, which the server's log-probabilities are compared with.
        tokenizer: decodes, and nothing else.
        sampling: temperature, truncation and seed, which go with every request.
        stop_ids: tokens that end a turn.
        config: where the server is, and how its weights are kept the trainer's.

    Raises:
        UserError: the server's log-probabilities would not be those of the sampled distribution, or there is no adapter
            to send.
    """

    sampler = "server"

    def __init__(
        self,
        lm: LanguageModel,
        tokenizer: Any,
        sampling: SamplingConfig,
        stop_ids: Sequence[int],
        config: BackendConfig,
    ) -> None:
        super().__init__(lm, tokenizer, sampling, stop_ids)
        self.config, self.model, self._unproven = config, config.model, False
        truncated = sampling.top_p < 1 or sampling.top_k > 0 or sampling.min_p > 0
        if config.logprobs == "raw" and sampling.temperature not in (0.0, 1.0):
            raise UserError(
                f"sampling.temperature is {sampling.temperature}, and the server reports log-probabilities of "
                "temperature 1: start it with --logprobs-mode processed_logprobs and set dialogue.backend.logprobs: "
                "processed"
            )
        if config.logprobs == "processed" and truncated:
            raise UserError(
                "sampling.top_p, top_k or min_p truncate, and a server that reports processed log-probabilities gives "
                "those of the truncated distribution, which are not the policy's: set them to 1, 0 and 0"
            )
        if config.sync == "adapter" and not hasattr(lm.hf, "peft_config"):
            raise UserError(
                "dialogue.backend.sync adapter sends the adapter, and the model has none: set lm.adapter, or train all "
                "weights with dialogue.backend own or continuous"
            )

    def begin_round(self, version: int) -> int:
        """Have the server load the present adapter, or see to it that it is not too far behind.

        Args:
            version: number of policy updates so far.

        Returns:
            The version that the server holds.

        Raises:
            UserError: the server cannot load the adapter, or is too far behind.
        """
        held = version if self.config.sync == "adapter" else 0
        if version - held > self.config.most_lag:
            raise UserError(
                f"the server at {self.config.url} holds the weights of version {held}, the trainer has made {version} "
                f"updates since, and dialogue.backend.most_lag is {self.config.most_lag}: use sync adapter, or allow "
                "the lag"
            )
        if self.config.sync == "adapter":
            self.model = self._sync(version)
        self._unproven = held == version
        return held

    def step(self, limits: Sequence[int], stops: Sequence[str] = ()) -> list[Turn]:
        """As `Backend.step`; the first turn after `begin_round` is compared with the trainer's weights.

        Raises:
            UserError: their log-probabilities are too far apart.
        """
        turns = super().step(limits, stops)
        if self._unproven and any(turn.ids for turn in turns):
            self._unproven = False
            self._compare(turns)
        return turns

    def complete(self, requests: Sequence[Request], stops: Sequence[str]) -> list[tuple[list[int], list[float]]]:
        """Send all requests, so many at once.

        Args:
            requests: at least one.
            stops: texts that end a turn.
        """
        with ThreadPoolExecutor(min(self.config.requests, len(requests))) as pool:
            return list(pool.map(lambda request: self._complete(request, stops), requests))

    def _complete(self, request: Request, stops: Sequence[str]) -> tuple[list[int], list[float]]:
        s = self.sampling
        answer = self._post(
            "/v1/completions",
            {
                "model": self.model,
                "prompt": request.ids,
                "max_tokens": request.limit,
                "temperature": s.temperature,
                "top_p": s.top_p,
                "top_k": s.top_k,
                "min_p": s.min_p,
                "seed": request.seed,
                "stop": list(stops),
                "stop_token_ids": sorted(self.ends.stop_ids),
                "include_stop_str_in_output": True,
                "skip_special_tokens": False,
                "add_special_tokens": False,
                "logprobs": 1,
                "return_token_ids": True,
                "return_tokens_as_token_ids": True,
            },
        )
        try:
            return sampled(json.loads(answer), request)
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise UserError(f"{self.config.url}: {error}; the server answered: {answer[:_SHOWN]}") from error

    def _compare(self, turns: Sequence[Turn]) -> None:
        some = sorted(enumerate(turns), key=lambda pair: -len(pair[1].ids))[:_COMPARED]
        by_trainer = scores(self.lm, [(self.ids(i), len(t.ids)) for i, t in some], self.sampling.temperature)
        pairs = [
            pair for (_, t), row in zip(some, by_trainer, strict=True) for pair in zip(row, t.logprobs, strict=True)
        ]
        gap = sum(abs(a - b) for a, b in pairs) / len(pairs)
        if not gap <= self.config.most_gap:
            raise UserError(
                f"the server at {self.config.url} gives log-probabilities that are {gap:.3g} nats a token from "
                f"those of the trainer's weights, and dialogue.backend.most_gap is {self.config.most_gap}: it holds "
                "other weights, or reports log-probabilities of another temperature (dialogue.backend.logprobs)"
            )

    # ---- weights ----

    def _sync(self, version: int) -> str:
        """Write and load the adapter; the name under which the server has it, the same on all processes."""
        config, tensors = self.lm.hf.peft_config["default"], _adapter_tensors(self.lm.hf)  # type: ignore[union-attr,index]
        told: list[Any] = ["", ""]  # name, error
        if not dist.is_initialized() or dist.get_rank() == 0:
            try:
                told[0] = self._load(version, config, tensors)
            except (UserError, OSError) as error:
                told[1] = str(error)
        if dist.is_initialized():
            dist.broadcast_object_list(told)
        if told[1]:
            raise UserError(told[1])
        return told[0]

    def _load(self, version: int, config: Any, tensors: dict[str, torch.Tensor]) -> str:
        from safetensors.torch import save_file

        digest = hashlib.sha256()
        for name in sorted(tensors):
            digest.update(name.encode() + tensors[name].contiguous().view(torch.uint8).numpy().tobytes())
        name = f"policy-{version}-{digest.hexdigest()[:12]}"
        folder = Path(self.config.folder).expanduser().resolve()
        place = folder / name
        place.mkdir(parents=True, exist_ok=True)
        save_file(tensors, place / "adapter_model.safetensors")
        config.save_pretrained(place)
        if name not in self._known():
            self._post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(place)})
        for old in folder.glob("policy-*"):
            if old.name != name:
                if old.name in self._known():
                    self._post("/v1/unload_lora_adapter", {"lora_name": old.name})
                shutil.rmtree(old, ignore_errors=True)
        return name

    def _known(self) -> set[str]:
        """Names of what the server has loaded."""
        return {str(entry["id"]) for entry in json.loads(self._request("/v1/models"))["data"]}

    # ---- HTTP ----

    def _post(self, path: str, body: dict[str, Any]) -> str:
        return self._request(path, json.dumps(body).encode())

    def _request(self, path: str, body: bytes | None = None) -> str:
        """The answer of the server; tried again where the fault may pass.

        Raises:
            UserError: the server refuses, or has failed for good.
        """
        url = self.config.url.rstrip("/") + path
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("VLLM_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        for pause in (*_PAUSES_S, None):
            try:
                asked = urllib.request.Request(url, body, headers)
                with urllib.request.urlopen(asked, timeout=self.config.timeout_s) as answer:
                    return answer.read().decode()
            except urllib.error.HTTPError as error:
                said = f"{error.code} {error.read().decode(errors='replace')[:_SHOWN]}"
                if error.code < 500:
                    raise UserError(f"{url} refuses: {said}") from error
            except (OSError, TimeoutError) as error:  # refused, broken off, or silent for too long
                said = f"{type(error).__name__}: {error}"
            if pause is None:
                raise UserError(f"{url} failed {len(_PAUSES_S) + 1} times, last with {said}")
            time.sleep(pause)
        raise AssertionError


def sampled(answer: dict[str, Any], request: Request) -> tuple[list[int], list[float]]:
    """Ids and log-probabilities from an answer of `/v1/completions`, if it can be believed.

    Args:
        answer: the decoded JSON.
        request: what was asked.

    Raises:
        ValueError: it holds no ids, other ids than it says elsewhere, another prompt, or not every log-probability.
    """
    (choice,) = answer["choices"]
    ids, prompt = choice.get("token_ids"), choice.get("prompt_token_ids", answer.get("prompt_token_ids"))
    if ids is None:
        raise ValueError("no token ids (vLLM gives them since 0.10.2), and text is never turned into ids again")
    if prompt is not None and list(prompt) != list(request.ids):
        raise ValueError(f"the server read a prompt of {len(prompt)} tokens that is not the one it was sent")
    read = (answer.get("usage") or {}).get("prompt_tokens")
    if read is not None and read != len(request.ids):
        raise ValueError(f"the server read {read} prompt tokens, and was sent {len(request.ids)}")
    logprobs = (choice.get("logprobs") or {}).get("token_logprobs")
    if logprobs is None:
        raise ValueError("no log-probabilities, without which the tokens cannot be trained on")
    if len(logprobs) != len(ids) or len(ids) > request.limit:
        raise ValueError(f"{len(ids)} token ids, {len(logprobs)} log-probabilities, a limit of {request.limit}")
    if any(p is None or not math.isfinite(p) or p > 1e-4 for p in logprobs):
        raise ValueError("a log-probability is missing, infinite or above 0")
    named = [str(token) for token in choice["logprobs"].get("tokens") or ()]
    if named and all(token.startswith("token_id:") for token in named):
        if [int(token.removeprefix("token_id:")) for token in named] != list(ids):
            raise ValueError("the log-probabilities are of other tokens than the ids")
    return [int(i) for i in ids], [min(float(p), 0.0) for p in logprobs]


def _adapter_tensors(hf: Any) -> dict[str, torch.Tensor]:
    """The adapter's weights as peft writes them; all processes together where they lie in shards."""
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(hf, save_embedding_layers=False)
    whole = {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in state.items()}
    return {name: t.detach().cpu().contiguous() for name, t in whole.items()}
