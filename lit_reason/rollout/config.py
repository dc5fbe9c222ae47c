"""How tokens are sampled. No torch import here: the command line reads this for its help."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SamplingConfig:
    """Settings of one batched generation.

    Args:
        max_new_tokens: upper limit of generated tokens a completion.
        temperature: softmax temperature; 0 is greedy.
        top_p: nucleus mass kept; 1 keeps all.
        top_k: number of most likely tokens kept; 0 keeps all.
        samples: completions a prompt.
        batch_size: sequences generated at once.
        seed: draws depend on (seed, prompt, sample) and never touch the global random state.
    """

    max_new_tokens: int = 256
    temperature: float = 0.6
    top_p: float = 0.95
    top_k: int = 0
    samples: int = 1
    batch_size: int = 32
    seed: int = 0
