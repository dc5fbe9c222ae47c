"""A student from nothing: word tokenizer with a chat template, tiny Llama, random weights, one plain folder."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

PAD, UNKNOWN, USER, ASSISTANT, END = "<|pad|>", "<|unknown|>", "<|user|>", "<|assistant|>", "<|end|>"
THINK, THINK_END = "<think>", "</think>"

# A blank belongs to the word behind it, so that joining the tokens gives the text back, byte for byte.
WORDS = r"\n\n|\.| ?[^\s.]+"

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message.role == 'user' -%}
<|user|>{{ message.content }}<|end|>
{%- elif message.role == 'assistant' -%}
<|assistant|>{{ message.content }}<|end|>
{%- else -%}
{{ raise_exception('this template knows user and assistant turns, not ' ~ message.role) }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}
"""


@dataclass(frozen=True)
class StudentConfig:
    """Size of the decoder.

    Args:
        width: hidden size.
        layers: decoder layers. Two are the least that can fetch a value by what stands before it.
        heads: attention heads.
        mlp_width: inner size of the gated feed-forward layer.
        context: longest sequence in tokens.
        init_std: standard deviation of the random weights. The customary 0.02 suits widths in the thousands; at
            width 64 it leaves attention flat for hundreds of steps.
    """

    width: int = 64
    layers: int = 2
    heads: int = 4
    mlp_width: int = 192
    context: int = 512
    init_std: float = 0.08


def words_of(texts: Iterable[str]) -> list[str]:
    """Every token text that some texts need, sorted.

    Args:
        texts: what the student will read and write.
    """
    return sorted({word for text in texts for word in re.findall(WORDS, text)})


def build_tokenizer(words: Sequence[str]) -> PreTrainedTokenizerFast:
    """A tokenizer with one id a word, and the chat template above.

    Args:
        words: texts of the tokens, leading blank included.

    Returns:
        A fast tokenizer whose `decode(encode(text))` is `text` for every text made of these words.
    """
    vocabulary: dict[str, int] = {}
    for word in (PAD, UNKNOWN, USER, ASSISTANT, END, THINK, THINK_END, *words):
        vocabulary.setdefault(word, len(vocabulary))
    backend = Tokenizer(WordLevel(vocabulary, unk_token=UNKNOWN))
    backend.pre_tokenizer = Split(Regex(WORDS), behavior="isolated")
    backend.decoder = Fuse()
    backend.add_special_tokens([AddedToken(t, normalized=False) for t in (PAD, UNKNOWN, USER, ASSISTANT, END)])
    # Think markers are no special tokens: decoded completions must show them.
    backend.add_tokens([AddedToken(t, normalized=False) for t in (THINK, THINK_END)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        unk_token=UNKNOWN,
        eos_token=END,
        additional_special_tokens=[USER, ASSISTANT],
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_model(config: StudentConfig, tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """A Llama with random weights; torch's global random state stays as it was.

    Args:
        config: its size.
        tokenizer: gives the vocabulary size and the end and padding tokens.
        seed: seed of the weights.
    """
    fields = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=config.width,
        intermediate_size=config.mlp_width,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.heads,
        max_position_embeddings=config.context,
        initializer_range=config.init_std,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(fields)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model.eval()


def write_student(folder: Path | str, words: Sequence[str], config: StudentConfig | None = None, seed: int = 0) -> Path:
    """Write tokenizer, chat template, config and random weights as a plain Hugging Face folder.

    Args:
        folder: replaced when it exists; it never lies there half-written.
        words: texts of the tokens (see `chain.words`, `search.words`).
        config: size of the decoder.
        seed: seed of the weights.

    Returns:
        The folder.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer(words)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        made = Path(scratch) / "made"
        build_model(config or StudentConfig(), tokenizer, seed).save_pretrained(made)
        tokenizer.save_pretrained(made)
        if folder.exists():
            shutil.rmtree(folder)
        made.rename(folder)
    return folder
