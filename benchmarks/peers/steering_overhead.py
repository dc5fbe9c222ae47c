"""What steering costs a generated token: the hook here, repeng and steering-vectors, on the same model and vector.

.venv-steering/bin/python -m benchmarks.peers.steering_overhead --model SmolLM2-135M-Instruct [--rounds 12]

`steering-requirements.txt` says how to make that environment. All run in one process, one after the other in every
round and in turned order; each round's ratio is to the same round's bare model. CPU time, one thread. All must give
the same logits. A model of two layers of the same width tells the microseconds, which the noise of the whole model
would hide.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from repeng import ControlModel, ControlVector
from steering_vectors import SteeringVector
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from benchmarks.record import record, spread, versions
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
def decode(model: Any, tokens: int) -> tuple[float, torch.Tensor]:
    """CPU seconds a token of a cached continuation, and its last logits."""
    cache, ids = DynamicCache(config=model.config), torch.arange(PROMPT)[None] + 5
    mask = torch.ones(1, PROMPT, dtype=torch.long)
    model(input_ids=ids, attention_mask=mask, past_key_values=cache)
    start = time.process_time()
    for step in range(tokens):
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        logits = model(input_ids=torch.tensor([[7 + step]]), attention_mask=mask, past_key_values=cache).logits
    return (time.process_time() - start) / tokens, logits


def measure(model: Any, layer: int, rounds: int, tokens: int) -> dict[str, Any]:
    """Seconds a token by way, their ratio to the bare model, and what steering adds in microseconds.

    Args:
        model: the model.
        layer: whose output is steered.
        rounds: repetitions; the first is thrown away.
        tokens: generated tokens a round and way.
    """
    vector = torch.randn(model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    contexts = ways(model, layer, vector)
    names, seconds, logits = list(contexts), {name: [] for name in contexts}, {}
    for turn in range(rounds + 1):
        for name in names[turn % 4 :] + names[: turn % 4]:
            with contexts[name]():
                taken, logits[name] = decode(model, tokens)
            if turn:
                seconds[name].append(taken)
    for name in names[1:]:
        assert not torch.equal(logits[name], logits["bare"]), f"{name} steered nothing"
        torch.testing.assert_close(logits[name], logits["lit_reason"], rtol=1e-3, atol=1e-3)
    pairs = {name: list(zip(seconds[name], seconds["bare"], strict=True)) for name in names}
    return {
        name: {
            "cpu_ms_a_token": spread([1e3 * s for s in seconds[name]]),
            "ratio_to_bare": spread([a / b for a, b in pairs[name]]),
            "added_us_a_token": spread([1e6 * (a - b) for a, b in pairs[name]]),
        }
        for name in names
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
    notes = ["CPU time of one thread, and ratios within a round; load_15_minutes tells what else the machine did"]
    command = ".venv-steering/bin/python -m benchmarks.peers.steering_overhead --model SmolLM2-135M-Instruct"
    print(record("steering_overhead", result, notes, f"{command} --rounds {args.rounds} --tokens {args.tokens}"))
    for part in ("whole model", "two layers of its width"):
        for name, figures in result[part].items():
            print(part, name, {k: {m: round(v, 4) for m, v in d.items()} for k, d in figures.items()})


if __name__ == "__main__":
    main()
