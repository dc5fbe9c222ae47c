"""Low-rank adapters (LoRA; QLoRA over a quantised base), gradient checkpointing, per-layer compilation."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel

from lit_reason.errors import UserError, did_you_mean
from lit_reason.models.config import AdapterConfig

if TYPE_CHECKING:  # peft loads bitsandbytes; full training needs neither
    from peft import PeftModel

log = logging.getLogger(__name__)


def quantization(adapter: AdapterConfig | None, dtype: torch.dtype) -> Any:
    """The transformers quantisation config for the frozen base, or None.

    Args:
        adapter: adapter settings, or None for full training.
        dtype: dtype in which the products are computed.

    Returns:
        A `BitsAndBytesConfig`: 4-bit NormalFloat with doubly quantised scales, or 8-bit integers.

    Raises:
        UserError: bitsandbytes is not installed.
    """
    if adapter is None or adapter.quantize == "none":
        return None
    try:
        import bitsandbytes  # noqa: F401
        from transformers import BitsAndBytesConfig
    except ImportError as error:
        raise UserError(
            f"adapter.quantize: {adapter.quantize} needs bitsandbytes: pip install 'lit-reason[quant]'"
        ) from error
    if adapter.quantize == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def add_adapter(model: PreTrainedModel, adapter: AdapterConfig) -> PeftModel:
    """Freeze the model and put a trainable adapter in it.

    Args:
        model: the base model, quantised or not.
        adapter: rank, targets and so on, or the folder of an adapter to continue; its own rank, scale and
            targets then hold.

    Returns:
        The peft model around `model`.

    Raises:
        UserError: no linear layer matches `targets`, or the folder has no adapter.
    """
    from peft import LoraConfig, TaskType, get_peft_model, prepare_model_for_kbit_training

    if getattr(model, "quantization_method", None) is not None:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        _keep_weights_fixed(model)
    if adapter.folder is not None:
        return _continue(model, adapter.folder)
    config = LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,  # type: ignore[arg-type]  # a fraction works and is divided by the rank
        lora_dropout=adapter.dropout,
        target_modules=_targets(model, adapter.targets),
        task_type=TaskType.CAUSAL_LM,
    )
    adapted: PeftModel = get_peft_model(model, config)  # type: ignore[assignment]
    if adapter.train_rest:
        for name, parameter in adapted.named_parameters():
            parameter.requires_grad_(".base_layer." not in name)
    return adapted


def _keep_weights_fixed(model: PreTrainedModel) -> None:
    """Stop bitsandbytes from repacking 4-bit weights on a CPU.

    On CPUs with bfloat16 instructions its first evaluation rounds the block scales to bfloat16 for good, so
    validating a model would change what training continues with; widths below the block size fail altogether.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def _targets(model: PreTrainedModel, targets: str | list[str]) -> str | list[str]:
    """Check the targets against the names of the model's linear layers."""
    if targets == "all-linear":
        return targets
    wanted = [targets] if isinstance(targets, str) else list(targets)
    # transformers' Conv1D (GPT-2) is a linear layer under another name.
    kinds = (nn.Linear,)
    names = [n for n, m in model.named_modules() if isinstance(m, kinds) or type(m).__name__ == "Conv1D"]
    suffixes = sorted({name.rsplit(".", 1)[-1] for name in names})
    for target in wanted:
        matched = [name for name in names if name == target or name.endswith("." + target)]
        if not matched:
            hint = did_you_mean(target, suffixes)
            raise UserError(f"adapter.targets: no linear layer '{target}'; this model has {', '.join(suffixes)}{hint}")
    return wanted


def _continue(model: PreTrainedModel, folder: str) -> PeftModel:
    from peft import PeftConfig, PeftModel

    place = Path(folder).expanduser()
    if not (place / "adapter_config.json").is_file():
        parent = place.parent
        near = did_you_mean(place.name, [p.name for p in parent.iterdir()]) if parent.is_dir() else ""
        missing = "holds no adapter_config.json" if place.is_dir() else f"does not exist{near}"
        raise UserError(f"adapter.folder: {folder} {missing}")
    saved = PeftConfig.from_pretrained(str(place))
    log.info("continuing the adapter in %s with its own settings (rank %s)", folder, getattr(saved, "r", "?"))
    try:
        return PeftModel.from_pretrained(model, str(place), is_trainable=True)
    except (RuntimeError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(f"adapter.folder: {folder} does not fit this base model: {first}") from error


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The repeated blocks of a model, in order.

    Raises:
        UserError: the architecture does not say which of its modules these are.
    """
    kinds = set(getattr(model, "_no_split_modules", None) or ())
    # A sharded layer's class is made of the layer's own.
    layers = [m for m in model.modules() if kinds & {cls.__name__ for cls in type(m).__mro__}]
    if not layers:
        raise UserError(f"{type(model).__name__} does not name its decoder layers; set compile: false")
    return layers


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Keep only the input of each decoder layer and recompute the rest in the backward pass.

    The non-reentrant form is used: it keeps keyword arguments (document boundaries among them) and works with
    a frozen embedding below an adapter.

    Raises:
        UserError: the architecture does not support it.
    """
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise UserError(f"gradient_checkpointing: {type(model).__name__} does not support it")
    if hasattr(model, "activation_checkpointing_enable"):  # the newer name of the same switch
        model.activation_checkpointing_enable({"use_reentrant": False})
    else:
        model.gradient_checkpointing_enable({"use_reentrant": False})


def compile_layers(model: PreTrainedModel) -> None:
    """Compile every decoder layer in place with `torch.compile`; one compilation serves all equal layers."""
    for layer in decoder_layers(model):
        layer.compile()
