"""Fixed samples with the lengths of chat data, and the models they are trained on. numpy alone: peers import it too."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

MEAN_LENGTH, SPREAD, SHORTEST, LONGEST = 120, 0.7, 16, 512
TRAINED_SHARE = 0.4
BATCH_ROWS = 8

# SmolLM2-135M by its published config; benchmarks start it from random weights, which cost the same time.
SMOLLM2_135M: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "rope_theta": 100000.0,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
LLAMA_5M = SMOLLM2_135M | {
    "vocab_size": 6016,
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
TINY = LLAMA_5M | {"vocab_size": 199, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}


@dataclass(frozen=True)
class Sample:
    """A conversation as tokens.

    Attributes:
        ids: prompt and reply.
        prompt: tokens at the front that are not trained.
    """

    ids: list[int]
    prompt: int

    @property
    def labels(self) -> list[int]:
        """The tokens, -100 where not trained."""
        return [-100] * self.prompt + self.ids[self.prompt :]


def chat_samples(vocabulary: int, count: int = 64, seed: int = 0) -> list[Sample]:
    """Random tokens in rows of log-normal length (mean about 120, longest 512), the last 40 % of each trained.

    Args:
        vocabulary: tokens are drawn from [3, vocabulary).
        count: number of samples; the first ones are the same for every count.
        seed: of lengths and tokens.
    """
    rng = np.random.default_rng(seed)
    lengths = rng.lognormal(np.log(MEAN_LENGTH) - SPREAD**2 / 2, SPREAD, count)
    lengths = np.clip(np.rint(lengths), SHORTEST, LONGEST).astype(int).tolist()
    return [Sample(rng.integers(3, vocabulary, n).tolist(), n - round(TRAINED_SHARE * n)) for n in lengths]


def batches_of(samples: list[Sample], *, by_length: bool = False) -> list[list[Sample]]:
    """Batches of 8, in order, or longest first as a sampler that groups by length makes them."""
    if by_length:
        samples = sorted(samples, key=lambda s: -len(s.ids))
    return [samples[i : i + BATCH_ROWS] for i in range(0, len(samples), BATCH_ROWS)]


def warm_up(vocabulary: int) -> list[Sample]:
    """One short batch: starts threads, allocators and optimizer state before the clock."""
    return [Sample([3 + i % (vocabulary - 3) for i in range(8)], 4)] * BATCH_ROWS
