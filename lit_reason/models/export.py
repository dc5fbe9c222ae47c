"""Write a model as a plain Hugging Face folder that any loader of such folders reads.

What a merged export holds, for a linear layer with weight W and a low-rank update s B A:

* unquantised base: W + s B A, summed in float32 and rounded once to the export dtype. Equal to the trained
  model up to that rounding.
* nf4 base: Q(W) + s B A, where Q(W) is the dequantised 4-bit weight that training multiplied by. Equal to the
  trained model up to rounding, and not equal to the original weights plus the update.
* int8 base: the same with 8-bit weights. During training bitsandbytes also rounds activations to 8 bits, so
  the export differs from the trained model by that rounding.
* low-rank layers: s B A^T + S, summed in float32 and rounded once; `merge=False` writes the factors instead.
"""

from __future__ import annotations

import copy
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from lit_reason.errors import UserError
from lit_reason.models.language_model import LanguageModel
from lit_reason.models.loading import resolve_dtype
from lit_reason.models.lowrank import LowRankLinear, save_factored
from lit_reason.models.reward import RewardModel

EXPORT_FILES = ("config.json", "adapter_config.json")


def export_model(
    lm: LanguageModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: str | Path,
    *,
    merge: bool = True,
    dtype: str | None = None,
) -> Path:
    """Write weights, configuration, generation settings, tokenizer and chat template.

    The folder appears complete or not at all: everything is written beside it and moved into place. An
    earlier export there is replaced. The model in memory is not changed, so this may be called during
    training.

    Args:
        lm: the model to write.
        tokenizer: its tokenizer, or None to leave it out.
        folder: where to write.
        merge: merge a low-rank adapter into the weights, or multiply out low-rank layers; otherwise write the
            adapter alone, or the factors. With neither there is nothing to merge and the whole model is written.
        dtype: `float32`, `bfloat16` or `float16` to convert the weights; None keeps theirs.

    Returns:
        The folder.

    Raises:
        UserError: the folder holds something that is not an export, or the dtype is unknown.
    """
    place = Path(folder).expanduser()
    if dtype not in (None, "float32", "bfloat16", "float16"):
        raise UserError(f"export: dtype is '{dtype}'; allowed: float32, bfloat16, float16")
    with _complete_folder(place) as fresh:
        if lm.config.lowrank is not None and not merge:
            save_factored(lm.base, lm.config.lowrank, fresh)
        elif merge or lm.base is lm.hf:
            plain_model(lm, None if dtype is None else resolve_dtype(dtype)).save_pretrained(fresh)
        else:
            lm.hf.save_pretrained(fresh, save_embedding_layers=False)  # type: ignore[operator]
        if tokenizer is not None:
            tokenizer.save_pretrained(fresh)
    return place


@contextmanager
def _complete_folder(place: Path) -> Iterator[Path]:
    """A temporary folder that takes the place of `place` when the block ends without an error."""
    _refuse_foreign(place)
    place.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{place.name}.", dir=place.parent))
    try:
        yield fresh
        os.chmod(fresh, 0o777 & ~_umask())
        _move(fresh, place)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


@torch.no_grad()
def export_reward(reward: RewardModel, tokenizer: PreTrainedTokenizerBase, folder: str | Path, *, pad_id: int) -> Path:
    """Write a reward model as a sequence-classification folder of one label, which plain transformers loads.

    Its scores there are ours before normalisation; `reward_mean` and `reward_std` in `config.json` normalise them.

    Args:
        reward: the model.
        tokenizer: its tokenizer; not changed.
        folder: where to write.
        pad_id: token that pads. transformers reads the score at the last token that is another, so it must not occur
            in texts: an end token would hide the ends.

    Returns:
        The folder.

    Raises:
        UserError: transformers knows no sequence-classification model of this architecture.
    """
    place, base = Path(folder).expanduser(), reward.lm.base
    config = copy.deepcopy(base.config)
    config.num_labels, config.problem_type = 1, "regression"
    config.get_text_config().pad_token_id = pad_id
    config.reward_mean, config.reward_std = reward.mean, reward.std
    config._attn_implementation = "eager"
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        try:
            plain: Any = AutoModelForSequenceClassification.from_config(config)
        except ValueError as error:
            kind = type(base).__name__
            raise UserError(f"export: transformers has no sequence-classification model for {kind}") from error
    with reward.active():
        state = _merged_state(base, resolve_dtype(reward.lm.config.dtype) if _has_quantised(base) else None)
    inner = f"{base.base_model_prefix}."
    state = {name: tensor for name, tensor in state.items() if name.startswith(inner)}
    if not hasattr(plain, "score") or plain.base_model_prefix != base.base_model_prefix:
        raise UserError(f"export: {type(plain).__name__} keeps its score in a way that is not known")
    weight: Any = reward.score.weight
    weight = weight.full_tensor() if hasattr(weight, "full_tensor") else weight
    _load(plain, {**state, "score.weight": weight.detach().to(next(iter(state.values())).dtype)})
    words = copy.deepcopy(tokenizer)
    words.pad_token = words.convert_ids_to_tokens(pad_id)
    with _complete_folder(place) as fresh:
        plain.save_pretrained(fresh)
        words.save_pretrained(fresh)
    return place


@torch.no_grad()
def plain_model(lm: LanguageModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The model without adapter and quantisation; it shares unchanged weights with `lm`.

    Args:
        lm: the model.
        dtype: dtype of all weights; None keeps theirs, and takes the dtype of the products for weights that
            were quantised.

    Returns:
        A transformers model of the same class, for saving or for inference.
    """
    base = lm.base
    if dtype is None and _has_quantised(base):
        dtype = resolve_dtype(lm.config.dtype)
    state = _merged_state(base, dtype)
    config = copy.deepcopy(base.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    if hasattr(lm.head.layer, "base_layer"):  # an adapter on a tied output layer makes it one of its own
        config.get_text_config().tie_word_embeddings = config.tie_word_embeddings = False
    config._attn_implementation = "eager"
    with torch.device("meta"):
        plain = type(base)(config)
    _load(plain, state)
    plain.generation_config = copy.deepcopy(base.generation_config)
    return plain.eval()


def _merged_state(base: PreTrainedModel, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Plain parameter and buffer names to tensors, adapters merged and quantised weights dequantised."""
    state: dict[str, Tensor] = {}
    cast: dict[int, tuple[Tensor, Tensor]] = {}  # tied tensors stay one; holding the source keeps its id unique

    def put(name: str, tensor: Tensor) -> None:
        if dtype is None or not tensor.is_floating_point():
            state[name] = tensor.detach()  # or loading it elsewhere would set `requires_grad` of the live weight
        else:
            if id(tensor) not in cast:
                cast[id(tensor)] = (tensor, tensor.detach().to(dtype))
            state[name] = cast[id(tensor)][1]

    def walk(module: nn.Module, prefix: str) -> None:
        if hasattr(module, "modules_to_save"):
            walk(module.modules_to_save[module.active_adapters[0]], prefix)  # type: ignore[index,operator,arg-type]
            return
        if isinstance(module, LowRankLinear):
            put(prefix + "weight", module.dense_weight(dtype))
            if module.bias is not None:
                put(prefix + "bias", module.bias)
            return
        layer: Any = module.base_layer if hasattr(module, "base_layer") else module
        if hasattr(module, "base_layer") or _is_quantised(layer):
            put(prefix + "weight", _merged_weight(module, layer))
            if getattr(layer, "bias", None) is not None:
                put(prefix + "bias", layer.bias)
            return
        for name, tensor in module.named_parameters(recurse=False, remove_duplicate=False):
            put(prefix + name, tensor)
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                put(prefix + name, buffer)
        for name, child in module.named_children():
            walk(child, f"{prefix}{name}.")

    walk(base, "")
    return state


def _has_quantised(model: nn.Module) -> bool:
    return any(_is_quantised(module) for module in model.modules())


def _is_quantised(layer: nn.Module) -> bool:
    """Whether bitsandbytes holds this layer's weight: 4-bit weights lie in bytes, 8-bit ones in integers."""
    return getattr(getattr(layer, "weight", None), "dtype", None) in (torch.uint8, torch.int8)


def _merged_weight(module: nn.Module, layer: Any) -> Tensor:
    """W + sum of the active adapters' updates, summed in float32; in W's dtype unless W was quantised."""
    weight = layer.weight
    dtype = weight.dtype if weight.is_floating_point() else torch.float32
    total = weight.to(torch.float32) if weight.is_floating_point() else _dequantised(layer)
    for name in getattr(module, "active_adapters", ()) if layer is not module else ():
        if name in module.lora_A:  # type: ignore[operator]
            total = total + module.get_delta_weight(name).to(torch.float32)  # type: ignore[operator]
    return total.to(dtype)


def _dequantised(layer: Any) -> Tensor:
    """The float32 weight of a bitsandbytes layer, leaving the layer as it is."""
    weight = layer.weight
    if weight.dtype == torch.int8:
        scale = layer.state.SCB if layer.state.SCB is not None else weight.SCB
        return weight.data.to(torch.float32) * (scale.to(torch.float32)[:, None] / 127)
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight.data, weight.quant_state).to(torch.float32)


def _load(plain: PreTrainedModel, state: dict[str, Tensor]) -> None:
    """Put the tensors in place; a name too many or too few is a defect, not a warning."""
    plain.load_state_dict(state, strict=True, assign=True)
    plain.tie_weights()


def _refuse_foreign(place: Path) -> None:
    if place.is_dir() and any(place.iterdir()) and not any((place / name).is_file() for name in EXPORT_FILES):
        found = ", ".join(sorted(p.name for p in place.iterdir())[:5])
        raise UserError(f"export: {place} holds files that are no model export ({found}); choose another folder")
    if place.exists() and not place.is_dir():
        raise UserError(f"export: {place} is a file; give a folder")


def _move(fresh: Path, place: Path) -> None:
    """Put the new folder where the old one was; the old one is kept until the new one stands."""
    if not place.exists():
        os.rename(fresh, place)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{place.name}.old.", dir=place.parent))
    os.rename(place, old / "export")
    try:
        os.rename(fresh, place)
    except OSError:
        os.rename(old / "export", place)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def _umask() -> int:
    """The process's file mode mask; temporary folders are private, an export is as open as other files."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
