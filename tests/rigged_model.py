"""A Llama whose next-token distribution is known in closed form, and a tokenizer of whole words.

Attention and feed-forward outputs are zero and the embedding is the identity, so the last hidden state is the
one-hot vector of the last token (scaled by the norm) and the head row gives exactly the wanted
log-probabilities: a bigram model that still runs through the whole library code, KV cache and padding
included.
"""

from __future__ import annotations

import math
from types import SimpleNamespace

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = [
    "<pad>",
    "<eos>",
    "<think>",
    "</think>",
    *"q r so try wait".split(),
    *[str(i) for i in range(10)],
    *"abcdefgh",
]


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Whole words, blank between them; think markers are special tokens."""
    model = Tokenizer(WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<pad>"))
    model.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=model,
        pad_token="<pad>",
        eos_token="<eos>",
        additional_special_tokens=["<think>", "</think>"],
    )


def ids_of(text: str) -> list[int]:
    """Token ids of words separated by blanks."""
    return [WORDS.index(w) for w in text.split()]


def random_llama(seed: int = 0, *, vocab: int = len(WORDS), context: int = 128) -> LlamaForCausalLM:
    """A tiny Llama with random weights that attend for real; float64, so that batch shapes do not matter."""
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=context,
        initializer_range=0.5,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config).double()
    torch.set_rng_state(state)
    return model


def bigram_llama(table: dict[str, dict[str, float]], *, context: int = 128) -> LlamaForCausalLM:
    """A Llama with P(next | last) = table[last][next]; every word that is not in the table is followed by
    <eos>."""
    vocab = len(WORDS)
    assert vocab <= 32
    model = random_llama(context=context)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                weight.zero_()
            elif "norm" in name:
                weight.fill_(1.0)
        model.model.embed_tokens.weight.zero_()[:, :vocab].fill_diagonal_(1.0)
        logp = torch.full((vocab, vocab), -1e4, dtype=torch.float64)  # [next, last]
        for last, word in enumerate(WORDS):
            for follower, p in table.get(word, {"<eos>": 1.0}).items():
                logp[WORDS.index(follower), last] = math.log(p) if p > 0 else -1e4
        norm = math.sqrt(1 / (1 / 32 + model.config.rms_norm_eps))  # what the final norm makes of a one-hot vector
        model.lm_head.weight.zero_()[:, :vocab] = logp / norm
    return model


def chain_llama(*sequences: str, context: int = 128) -> LlamaForCausalLM:
    """A Llama that continues each sequence word by word (no word may have two followers)."""
    table: dict[str, dict[str, float]] = {}
    for sequence in sequences:
        words = sequence.split()
        for last, follower in zip(words, words[1:], strict=False):
            assert table.get(last, {follower: 1.0}) == {follower: 1.0}, f"{last} has two followers"
            table[last] = {follower: 1.0}
    return bigram_llama(table, context=context)


def as_lm(model: torch.nn.Module) -> SimpleNamespace:
    """What the sampler takes for a language model."""
    return SimpleNamespace(hf=model)
