"""Tiny models of several families with weights large enough that attention matters."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from lit_reason.models.config import ModelConfig
from lit_reason.models.language_model import LanguageModel

VOCAB = 61
WIDE = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA_LIKE = WIDE | {"num_key_value_heads": 2, "head_dim": 8}
WINDOW = {"sliding_window": 4}

FAMILIES: dict[str, dict] = {
    "llama": LLAMA_LIKE | {"tie_word_embeddings": True},
    "qwen2": LLAMA_LIKE,
    "qwen3": LLAMA_LIKE,
    "mistral": LLAMA_LIKE | WINDOW,
    "gemma2": LLAMA_LIKE
    | WINDOW
    | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 1.5, "query_pre_attn_scalar": 8},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "tie_word_embeddings": True},
    "gpt_neox": WIDE,
    "cohere": LLAMA_LIKE | {"logit_scale": 0.25},
    "granite": LLAMA_LIKE | {"logits_scaling": 4.0},
}


def fields(family: str, **changes) -> dict:
    """Config fields of a tiny model of this family."""
    common = {
        "vocab_size": VOCAB,
        "initializer_range": 0.3,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if family != "gpt2":
        common["max_position_embeddings"] = 64
    else:
        common |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return common | {"model_type": family} | FAMILIES[family] | changes


def tiny(family: str = "llama", seed: int = 0, *, changes: dict | None = None, **settings) -> LanguageModel:
    """A tiny language model in evaluation mode."""
    torch.manual_seed(seed)
    config = ModelConfig(config=fields(family, **(changes or {})), **settings)
    return LanguageModel.load(config).eval()


def pack(*documents: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token ids, positions and cumulative lengths of documents laid end to end."""
    ids = torch.tensor([token for document in documents for token in document])
    positions = torch.cat([torch.arange(len(document)) for document in documents])
    edges = torch.tensor([0] + [len(document) for document in documents]).cumsum(0).to(torch.int32)
    return ids, positions, edges


def documents(*lengths: int, seed: int = 5) -> list[list[int]]:
    """Random documents of these lengths."""
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB, (length,), generator=g).tolist() for length in lengths]


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Whole words `w3` ... `w60`, with a chat template."""
    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, VOCAB)}
    core = Tokenizer(WordLevel(words, unk_token="<pad>"))
    core.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    return tokenizer


def save_tiny(folder: Path, family: str = "llama", **settings) -> LanguageModel:
    """Write a tiny model and its tokenizer with transformers' own writer."""
    lm = tiny(family, **settings)
    lm.hf.save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    assert json.loads((folder / "config.json").read_text())["model_type"] == family
    return lm
