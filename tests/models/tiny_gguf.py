"""Writes a tiny Llama as a GGUF file with the gguf package, weights in float32 and 8-bit blocks."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
from tiny_models import fields, tiny
from transformers.convert_slow_tokenizer import bytes_to_unicode

from lit_reason.models.language_model import LanguageModel

SPECIAL = ["<|im_start|>", "<|im_end|>"]
TOKENS = SPECIAL + list(bytes_to_unicode().values()) + ["he", "Ġt"]
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_gguf(file: Path) -> LanguageModel:
    """Write the file and return the model whose weights it holds (8-bit blocks for one matrix are exact by choice)."""
    shape = {
        "vocab_size": len(TOKENS),
        "intermediate_size": 64,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
    }
    lm = tiny("llama", changes=shape)
    made = fields("llama", **shape)
    w = gguf.GGUFWriter(str(file), "llama")
    w.add_context_length(made["max_position_embeddings"])
    w.add_embedding_length(made["hidden_size"])
    w.add_block_count(made["num_hidden_layers"])
    w.add_feed_forward_length(made["intermediate_size"])
    w.add_head_count(made["num_attention_heads"])
    w.add_head_count_kv(made["num_key_value_heads"])
    w.add_rope_dimension_count(made["head_dim"])
    w.add_rope_freq_base(10000.0)
    w.add_layer_norm_rms_eps(lm.base.config.rms_norm_eps)
    w.add_vocab_size(len(TOKENS))
    w.add_tokenizer_model("gpt2")
    w.add_token_list(TOKENS)
    w.add_token_types([3] * len(SPECIAL) + [1] * (len(TOKENS) - len(SPECIAL)))
    w.add_token_merges(["h e", "Ġ t"])
    w.add_bos_token_id(0)
    w.add_eos_token_id(1)
    w.add_pad_token_id(1)
    w.add_chat_template("{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}")
    for name, tensor in lm.base.named_parameters():
        data = tensor.detach().numpy()
        if name.endswith("down_proj.weight"):
            packed = gguf.quants.quantize(data, gguf.GGMLQuantizationType.Q8_0)
            tensor.data.copy_(_tensor(gguf.quants.dequantize(packed, gguf.GGMLQuantizationType.Q8_0)))
            w.add_tensor(_name(name), packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
            continue
        for kind, heads in (("q_proj", 4), ("k_proj", 2)):
            if kind in name:  # the file format interleaves the two halves of each rotary head
                rows = data.reshape(heads, 2, -1, data.shape[1]).swapaxes(1, 2)
                data = np.ascontiguousarray(rows.reshape(data.shape))
        w.add_tensor(_name(name), data)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return lm


def _name(name: str) -> str:
    stem = name.removesuffix(".weight")
    if stem.startswith("model.layers."):
        _, _, layer, inner = stem.split(".", 3)
        return f"blk.{layer}.{NAMES[inner]}.weight"
    return f"{NAMES[stem]}.weight"


def _tensor(array: np.ndarray):
    import torch

    return torch.from_numpy(np.ascontiguousarray(array))
