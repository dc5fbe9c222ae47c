"""What steering costs a generated token: the hook here, repeng and steering-vectors, on the same model and vector.

.venv-steering/bin/python -m benchmarks.peers.steering_overhead --model SmolLM2-135M-Instruct [--rounds 12]

`steering-requirements.txt` says how to make that environment. All run in one process, with a cache each, and take turns
token by token in changing order, so that what else the machine does falls on all alike; every difference is to the bare
model at the same token. CPU time, one thread. All must give the same logits. A model of two layers of the same width
tells the microseconds, which the noise of the whole model would hide.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from repeng import ControlModel, ControlVector
from steering_vectors import SteeringVector
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from benchmarks.record import record, versions
from lit_reason.models.config import ModelConfig
from lit_reason.models.loading import load_model
from lit_reason.steering.config import SteerConfig
from lit_reason.steering.direction_file import Directions, model_facts
from lit_reason.steering.hook import SteeringHook

PROMPT = 32


@contextmanager
def by_repeng(model: Any, layer: int, vector: torch.Tensor) -> Iterator[None]:
    """Steer with repeng 0.4."""
    control = ControlModel(model, [layer])
    control.set_control(ControlVector(model.config.model_type, {layer: vector.numpy()}), 1.0)
    try:
        yield
    finally:
        control.reset()
        control.unwrap()


def ways(model: Any, layer: int, vector: torch.Tensor) -> dict[str, Callable[[], Any]]:
    """Contexts in which the model is steered, by name.

    Args:
        model: the model.
        layer: whose output gets the vector.
        vector: what is added.
    """
    there = Directions({"v": vector}, layer, 1.0, None, {"model": model_facts(model)})
    ours = SteeringHook(model, there, SteerConfig(mix={"v": 1.0}, strength=1.0, unit="raw"))
    theirs = SteeringVector({layer: vector})
    return {
        "bare": nullcontext,
        "lit_reason": lambda: ours,
        "repeng": lambda: by_repeng(model, layer, vector),
        "steering-vectors": lambda: theirs.apply(model),
    }


@torch.no_grad()
def decode(model: Any, contexts: dict[str, Callable[[], Any]], tokens: int, turn: int) -> tuple[dict, dict]:
    """CPU seconds of each token of a cached continuation, and its last logits, by way.

    Args:
        model: the model.
        contexts: the ways.
        tokens: how many.
        turn: who begins.
    """
    caches = {name: DynamicCache(config=model.config) for name in contexts}
    seconds, logits, names = {name: [] for name in contexts}, {}, list(contexts)
    for step in range(-1, tokens):  # first the prompt, which does not count
        ids = torch.arange(PROMPT)[None] + 5 if step < 0 else torch.tensor([[7 + step]])
        mask, first = torch.ones(1, PROMPT + step + 1, dtype=torch.long), (turn + step) % len(names)
        for name in names[first:] + names[:first]:
            with contexts[name]():
                start = time.process_time()
                logits[name] = model(input_ids=ids, attention_mask=mask, past_key_values=caches[name]).logits
                if step >= 0:
                    seconds[name].append(time.process_time() - start)
    return seconds, logits


def measure(model: Any, layer: int, rounds: int, tokens: int) -> dict[str, Any]:
    """CPU milliseconds a token by way, and what steering adds to the bare model's at the same token.

    Args:
        model: the model.
        layer: whose output is steered.
        rounds: continuations; the first is thrown away.
        tokens: of a continuation.
    """
    vector = torch.randn(model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    contexts = ways(model, layer, vector)
    taken: dict[str, list[float]] = {name: [] for name in contexts}
    for turn in range(rounds + 1):
        seconds, logits = decode(model, contexts, tokens, turn)
        for name in contexts if turn else ():
            taken[name] += seconds[name]
    bare, found = np.array(taken.pop("bare")), {}
    for name, seconds in taken.items():
        assert not torch.equal(logits[name], logits["bare"]), f"{name} steered nothing"
        torch.testing.assert_close(logits[name], logits["lit_reason"], rtol=1e-3, atol=1e-3)
        found[name] = {
            "cpu_ms_a_token": 1e3 * float(np.median(seconds)),
            "added_us_a_token": median(1e6 * (np.array(seconds) - bare)),
            "ratio_to_bare": median(np.array(seconds) / bare),
        }
    return {"tokens": len(bare), "bare": {"cpu_ms_a_token": 1e3 * float(np.median(bare))}, **found}


def median(values: np.ndarray) -> dict[str, float]:
    """The median with its 95 % bootstrap interval, and the quartiles of the values."""
    drawn = np.random.default_rng(0).choice(values, (2000, len(values)))
    low, high = np.quantile(np.median(drawn, 1), [0.025, 0.975])
    first, middle, third = np.quantile(values, [0.25, 0.5, 0.75])
    return {
        k: float(v)
        for k, v in zip(("median", "low", "high", "q1", "q3"), (middle, low, high, first, third), strict=True)
    }


def main() -> None:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder, GGUF file or hub id")
    parser.add_argument("--layer", type=int, default=14)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=24)
    args = parser.parse_args()
    torch.set_num_threads(1)
    whole = load_model(ModelConfig(path=args.model, dtype="float32")).eval()
    width = whole.config.hidden_size
    torch.manual_seed(0)
    small = LlamaForCausalLM(
        LlamaConfig(hidden_size=width, intermediate_size=64, num_hidden_layers=2, num_attention_heads=9, vocab_size=512)
    ).eval()
    result = {
        "whole model": measure(whole, args.layer, args.rounds, args.tokens),
        "two layers of its width": measure(small, 1, 3 * args.rounds, 5 * args.tokens),
        "peers": versions(["repeng", "steering-vectors"]),
        "settings": {"layer": args.layer, "rounds": args.rounds, "tokens": args.tokens, "prompt": PROMPT, "batch": 1},
    }
    notes = ["CPU time of one thread; intervals are 95 % bootstrap ones of the median over tokens"]
    command = ".venv-steering/bin/python -m benchmarks.peers.steering_overhead --model SmolLM2-135M-Instruct"
    print(record("steering_overhead", result, notes, f"{command} --rounds {args.rounds} --tokens {args.tokens}"))
    for part in ("whole model", "two layers of its width"):
        for name, figures in result[part].items():
            print(part, name, figures)


if __name__ == "__main__":
    main()
