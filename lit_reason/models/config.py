"""What a recipe may say about the model. No torch import here: the command line reads this for its help."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class AdapterConfig:
    """Low-rank adapter (LoRA), and with `quantize` QLoRA; built by peft.

    Args:
        rank: rank r of the update B A.
        alpha: scale; the update is multiplied by alpha / rank.
        dropout: dropout on the adapter's input.
        targets: linear layers to adapt, by name suffix; `all-linear` means every linear layer but the head.
        quantize: hold the frozen base in 4-bit NormalFloat (`nf4`) or 8-bit integers (`int8`) through
            bitsandbytes; `none` keeps it in the model's dtype.
        folder: continue training the adapter saved in this folder instead of starting a new one.
        train_rest: train what has no adapter too (embeddings, norms, output layer), as pretraining with LoRA does.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: str | list[str] = "all-linear"
    quantize: Literal["none", "nf4", "int8"] = "none"
    folder: str | None = None
    train_rest: bool = False


@dataclass(frozen=True)
class LowRankConfig:
    """Linear layers of low rank instead of dense ones: `W = (alpha / rank) B A + S`, all of it trained.

    Args:
        rank: rank r of the product; at most the shorter side of every layer.
        alpha: scale; the product is multiplied by alpha / rank.
        init: `kaiming` draws both factors; `zero` draws A and starts B at zero; `svd` takes the best factors of the
            dense weights. `auto` is `svd` for a model from `path`, `zero` with a sparse part, else `kaiming`.
        targets: linear layers to replace, by words in their path; `all-linear` means attention and MLP, which is
            every linear layer inside the decoder layers.
        sparse_density: share of the entries of W that a sparse part S holds at random, fixed places (SLTrain); 0 is
            none.
    """

    rank: int = 128
    alpha: float = 32.0
    init: Literal["auto", "kaiming", "zero", "svd"] = "auto"
    targets: str | list[str] = "all-linear"
    sparse_density: float = 0.0


@dataclass(frozen=True)
class ModelConfig:
    """Where the model comes from and how it runs.

    Args:
        path: a local Hugging Face folder, a `.gguf` file, or a hub id. Leave empty with `config`.
        config: fields of a Hugging Face config, `model_type` among them, to start from random weights.
        tokenizer: folder, `.gguf` file or hub id of the tokenizer; default: beside the model.
        chat_template: a `.jinja` file that replaces the tokenizer's own chat template.
        dtype: weights and computation; `auto` is float32 on a CPU and bfloat16 on a GPU that has it. To train all
            weights on a GPU, prefer float32 with `trainer.precision: bf16-mixed`: bfloat16 weights lose small updates.
        attention: attention back end. `auto` takes the fastest that isolates packed rows on this device;
            `documents` runs SDPA row by row; `sdpa`, `eager` and `flex` use a block mask; `varlen` needs CUDA.
        adapter: train a low-rank adapter instead of all weights.
        lowrank: make the linear layers low-rank themselves (pretraining in little memory); not with `adapter`.
        gradient_checkpointing: recompute activations in the backward pass: less memory, about a third more time.
        compile: compile each decoder layer with `torch.compile` (worth it after some hundred steps).
        overrides: config fields to change on load, such as `rope_theta` or `max_position_embeddings`.
        trust_remote_code: run Python code that comes with the model. Off unless you trust its author.
    """

    path: str | None = None
    config: dict[str, Any] | None = None
    tokenizer: str | None = None
    chat_template: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    attention: Literal["auto", "documents", "sdpa", "eager", "flex", "varlen"] = "auto"
    adapter: AdapterConfig | None = None
    lowrank: LowRankConfig | None = None
    gradient_checkpointing: bool = False
    compile: bool = False
    overrides: dict[str, Any] = field(default_factory=dict)
    trust_remote_code: bool = False
