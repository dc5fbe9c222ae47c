"""A tiny model, labelled files and directions for the tests of steering."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from lit_reason.models.config import ModelConfig
from lit_reason.models.language_model import LanguageModel
from lit_reason.steering.direction import Evidence
from lit_reason.steering.direction_file import Directions, model_facts
from lit_reason.steering.probe import Probe, fit_probe

NORM = 5.0


def llama(seed: int = 0, **settings) -> LlamaForCausalLM:
    """A Llama with random weights that attend for real, in float64."""
    fields = {
        "vocab_size": 40,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.3,
        "bos_token_id": None,
        "eos_token_id": None,
        **settings,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**fields)).double().eval()


def lm() -> LanguageModel:
    """A tiny language model of the library, in float32."""
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    fields = {"model_type": "llama", "num_hidden_layers": 3, "bos_token_id": None, "eos_token_id": None, **sizes}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LanguageModel.load(ModelConfig(config=fields, dtype="float32")).eval()


def directions(model, layer: int = 1, seed: int = 3, pieces: int | None = None, **facts) -> Directions:
    """Two random directions `a` and `b` of a model."""
    rng = torch.Generator().manual_seed(seed)
    shape = (model.config.hidden_size,) if pieces is None else (pieces, model.config.hidden_size)
    vectors = {name: torch.randn(shape, generator=rng) for name in "ab"}
    return Directions(vectors, layer, NORM, None, {"model": model_facts(model, "tiny"), "classes": ["a", "b"], **facts})


def unit(vector: Tensor) -> Tensor:
    return vector / vector.norm()


def evidence(features_NF: Tensor, labels: np.ndarray, *, log_probs_NK: Tensor | None = None, **fields) -> Evidence:
    """Features as evidence, each a text of its own."""
    classes = int(labels.max()) + 1
    probe = fields.pop("probe", None) or fit_probe(features_NF, torch.from_numpy(labels), classes, 1e-3)
    given = {
        "features_NF": features_NF,
        "labels_N": labels,
        "rows_N": np.arange(len(labels)),
        "places_N": np.ones(len(labels), dtype=np.int64),
        "log_probs_NK": probe.log_probs(features_NF) if log_probs_NK is None else log_probs_NK,
        "probe": probe,
        "names": [f"c{k}" for k in range(classes)],
        "pair_of": {},
        "contrasts": {},
        "seed": 0,
        **fields,
    }
    return Evidence(**given)


def exact_probe(mu_F: Tensor) -> Probe:
    """The posterior of two Gaussians of unit covariance at -mu and mu, classes 0 and 1: P(1 | x) = sigmoid(2 mu x)."""
    return Probe(torch.stack([torch.zeros_like(mu_F), 2 * mu_F]), torch.zeros(2))


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
