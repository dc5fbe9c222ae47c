"""What a training step costs and what the device could do: operations, matmul rate, memory.

Symbols: L layers, D attention width (heads x head size), N parameters, V vocabulary.
"""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class ModelFlops:
    """Floating-point operations of one training step, forward and backward, without recomputation.

    A multiplication by a matrix of n weights costs 2 n a token forward, 2 n for the gradient of its input and
    2 n for the gradient of its weights. The last third falls away where the weights are frozen (LoRA): 4 n
    instead of 6 n. Attention has no weights: 12 L D per pair of positions, half of it under the causal mask,
    document by document. Sliding windows and gradient checkpointing are not taken into account.

    Attributes:
        per_token: operations a token in the weights of the layers (6 N, or 4 N where frozen).
        per_pair: operations a pair of positions, causal (12 L D / 2).
        per_trained: operations a trained token in the head (6 V D_model, or 4 V D_model when frozen).
    """

    per_token: float
    per_pair: float
    per_trained: float

    def step(self, lengths: Sequence[int], trained: int) -> float:
        """Operations of one pack.

        Args:
            lengths: tokens of each document in it.
            trained: rows that go through the head.
        """
        pairs = sum(n * n for n in lengths)
        return self.per_token * sum(lengths) + self.per_pair * pairs + self.per_trained * trained


def peak_memory(device: torch.device) -> int:
    """Highest memory use so far in bytes: torch's allocations on a CUDA device, else the process's resident
    size.

    Args:
        device: where the model is.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # Linux counts kibibytes, macOS bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def model_flops(model: Any) -> ModelFlops | None:
    """Count a causal language model's operations from its parameters and config.

    Args:
        model: a transformers model, plain or wrapped by peft; may be quantised.

    Returns:
        The cost of tokens, pairs and head rows; None for mixture-of-experts models.
    """
    config = model.config.get_text_config()
    if any(getattr(config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts")):
        return None
    head = model.get_output_embeddings()
    head = getattr(head, "base_layer", head)
    skip = {id(p) for m in model.modules() if isinstance(m, torch.nn.Embedding) for p in m.parameters(recurse=False)}
    skip |= {id(p) for p in head.parameters(recurse=False)}
    per_token = sum(_cost(p) for p in model.parameters() if id(p) not in skip)
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    return ModelFlops(per_token, 12 * config.num_hidden_layers * width / 2, _cost(head.weight))


def _cost(parameter: torch.nn.Parameter) -> float:
    """Operations a token that one weight tensor causes, forward and backward."""
    quantised = getattr(parameter, "quant_state", None)  # 4-bit weights are packed: ask for the true shape
    size = math.prod(quantised.shape) if quantised is not None else parameter.numel()
    return (6 if parameter.requires_grad else 4) * size


def matmul_rate(device: torch.device, dtype: torch.dtype, budget_s: float = 0.25) -> float:
    """The rate of square matrix products on this device, in floating-point operations a second.

    Products of growing size (256 to 8192) are timed, then the largest that fits again and again until the budget is
    spent; the best rate counts. On a CPU the number holds for the threads torch may use now, and falls when other
    processes are at work.

    Args:
        device: where to measure.
        dtype: precision of the factors.
        budget_s: time to spend, in seconds, beyond a short warm-up.
    """
    generator = torch.Generator(device).manual_seed(0)  # the run's own random state stays untouched

    def factors(size: int) -> list[torch.Tensor]:
        return [torch.randn(size, size, device=device, dtype=dtype, generator=generator) for _ in range(2)]

    def seconds(pair: list[torch.Tensor]) -> float:
        _wait(device)
        start = time.perf_counter()
        torch.mm(*pair)
        _wait(device)
        return time.perf_counter() - start

    size, pair, rate = 256, factors(256), 0.0
    seconds(pair)  # loads the library
    end = time.perf_counter() + budget_s
    while True:
        took = seconds(pair)
        rate = max(rate, 2 * size**3 / took)
        left = end - time.perf_counter()
        if left <= 0:
            return rate
        if size < 8192 and 16 * took < left:  # 8 times the work, and about as long to draw the factors
            size *= 2
            pair = factors(size)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
