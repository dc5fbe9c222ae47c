"""Find and read a model and its tokenizer: a folder, a GGUF file, a hub id, or a config (random weights)."""

from __future__ import annotations

import copy
import difflib
import importlib.util
import os
import pickle
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from lit_reason.errors import UserError, did_you_mean
from lit_reason.models.config import ModelConfig

READ_ERRORS: tuple[type[Exception], ...] = (OSError, ValueError, ImportError, KeyError)
READ_ERRORS += (SafetensorError, struct.error, pickle.UnpicklingError, IndexError, EOFError)  # of damaged files
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "spiece.model")


def locate(given: str, what: str) -> tuple[str, dict[str, str]]:
    """Turn what the user wrote into arguments of `from_pretrained`.

    Args:
        given: a folder, a `.gguf` file or a hub id.
        what: the option it came from, for messages.

    Returns:
        The folder or hub id, and `{"gguf_file": name}` for a GGUF file or an empty dict.

    Raises:
        UserError: a local path that does not exist, a file that is no GGUF, or the gguf package is missing.
    """
    path = Path(given).expanduser()
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise UserError(f"{what}: {given} is a file; give a model folder, a .gguf file or a hub id")
        if importlib.util.find_spec("gguf") is None:
            raise UserError(f"{what}: reading {path.name} needs the gguf package: pip install 'lit-reason[gguf]'")
        return str(path.parent), {"gguf_file": path.name}
    if path.is_dir():
        return str(path), {}
    looks_local = given.startswith((".", "/", "~")) or given.endswith(".gguf") or given.count("/") > 1
    if looks_local or not given:
        raise UserError(f"{what}: {given or 'an empty path'} does not exist{_nearest(path)}")
    return given, {}


def _nearest(path: Path) -> str:
    """Suggestion taken from the entries beside the first part of a path that does not exist."""
    parent, child = path.parent, path.name
    while not parent.is_dir() and parent != parent.parent:
        parent, child = parent.parent, parent.name
    hint = did_you_mean(child, sorted(p.name for p in parent.iterdir())) if parent.is_dir() else ""
    return f": no '{child}' in {parent}{hint}"


@contextmanager
def hub_errors(given: str, what: str) -> Iterator[None]:
    """Turn the failures of a hub look-up, and of reading damaged files, into one message."""
    try:
        yield
    except READ_ERRORS as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if "trust_remote_code" in str(error):
            raise UserError(
                f"{what}: {given} brings its own Python code; set trust_remote_code: true only if you trust its author"
            ) from error
        if Path(given).expanduser().exists():
            raise UserError(f"{what}: cannot read {given}: {first}") from error
        offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "TRUE", "YES", "ON"}
        reason = "the hub is switched off by HF_HUB_OFFLINE" if offline else f"the hub said: {first}"
        near = difflib.get_close_matches(given, [p.name for p in Path.cwd().iterdir() if p.is_dir()], n=1)
        hint = f"; did you mean the folder '{near[0]}'?" if near else ""
        raise UserError(
            f"{what}: '{given}' is no local folder and could not be had from the Hugging Face hub ({reason}){hint}"
        ) from error


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The tokenizer that `config` names, with its chat template replaced when `config.chat_template` says so.

    Args:
        config: what the recipe says about the model.

    Returns:
        A transformers tokenizer.

    Raises:
        UserError: nothing to read at that place, or the template file is missing.
    """
    given = config.tokenizer or config.path
    what = "tokenizer" if config.tokenizer else "model path"
    if given is None:
        raise UserError("tokenizer: a model made from `config` has no tokenizer of its own; set `tokenizer`")
    source, gguf = locate(given, what)
    if not gguf and Path(source).is_dir() and not any((Path(source) / name).is_file() for name in TOKENIZER_FILES):
        found = ", ".join(sorted(p.name for p in Path(source).iterdir())[:8]) or "nothing"
        raise UserError(f"{what}: no tokenizer in {given} (found {found}); set `tokenizer` to a folder that has one")
    with hub_errors(given, what):
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=config.trust_remote_code, **gguf)
    if config.chat_template is not None:
        file = Path(config.chat_template).expanduser()
        if not file.is_file():
            raise UserError(f"chat_template: {config.chat_template} does not exist{_nearest(file)}")
        tokenizer.chat_template = file.read_text(encoding="utf-8")
    return tokenizer


def resolve_dtype(name: str) -> torch.dtype:
    """The dtype of weights and computation: `auto` is bfloat16 on a GPU that has it, else float32."""
    if name == "auto":
        return torch.bfloat16 if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else torch.float32
    return getattr(torch, name)


@contextmanager
def own_random_stream(number: int = 0) -> Iterator[None]:
    """New weights depend on the seed alone, and drawing them leaves the global random stream where it was.

    Args:
        number: streams of different numbers are independent.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(torch.initial_seed() + number)
        yield


def load_model(config: ModelConfig, quantization: Any = None) -> PreTrainedModel:
    """The causal language model that `config` names, in evaluation mode, without adapter.

    Args:
        config: what the recipe says about the model.
        quantization: a transformers quantisation config, or None.

    Returns:
        A transformers causal language model.

    Raises:
        UserError: nothing to read there, a wrong override, or both or neither of `path` and `config` given.
    """
    if (config.path is None) == (config.config is None):
        raise UserError("model: give exactly one of `path` (folder, .gguf file, hub id) and `config` (random weights)")
    dtype = resolve_dtype(config.dtype)
    with own_random_stream():
        if config.config is not None:
            fields = _overridden(_config_from_fields(config.config), config.overrides)
            with _default_dtype(dtype):
                model = AutoModelForCausalLM.from_config(fields, trust_remote_code=config.trust_remote_code)
            return model.eval() if quantization is None else _reload_quantised(model, dtype, quantization)
        return _read(config, dtype, quantization)


def _read(config: ModelConfig, dtype: torch.dtype, quantization: Any) -> PreTrainedModel:
    given = config.path
    assert given is not None
    source, gguf = locate(given, "model path")
    if not gguf and Path(source).is_dir() and not (Path(source) / "config.json").is_file():
        if (Path(source) / "adapter_config.json").is_file():
            raise UserError(
                f"model path: {given} holds an adapter; set path to its base model and adapter.folder to it"
            )
        found = ", ".join(sorted(p.name for p in Path(source).iterdir())[:8]) or "nothing"
        raise UserError(f"model path: {given} is no model folder: config.json is missing (found {found})")
    remote = {"trust_remote_code": config.trust_remote_code}
    with hub_errors(given, "model path"):
        fields = AutoConfig.from_pretrained(source, **remote, **gguf)
    fields = _overridden(fields, config.overrides)
    factored = (Path(source) / "lowrank.json").is_file()  # the caller makes the layers and reads the factors
    if factored or torch.get_default_device().type == "meta":  # shapes without weights: to plan a run
        model = AutoModelForCausalLM.from_config(fields, dtype=dtype, **remote)
        if (Path(source) / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(source)
        return model.eval()
    now, later = quantization, None
    if gguf:  # transformers does not quantise to another format while it reads a GGUF file
        now, later = _unpack_blocks(), quantization
    how = gguf if now is None else gguf | {"quantization_config": now}
    with hub_errors(given, "model path"):
        read: Any = AutoModelForCausalLM.from_pretrained(
            source,
            config=fields,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, with their names
            **remote,
            **how,
        )
    model, report = read
    _refuse_gaps(given, report)
    return model if later is None else _reload_quantised(model, dtype, later)


def _refuse_gaps(given: str, report: dict[str, Any]) -> None:
    """Refuse weights that are not in the files or have another shape: they would start at random."""
    missing, other = sorted(report["missing_keys"]), sorted(str(entry[0]) for entry in report["mismatched_keys"])
    for names, what in ((other, "of another shape than config.json and lm.overrides say"), (missing, "missing")):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise UserError(f"model path: weights of {given} are {what}: {', '.join(names[:3])}{more}")


def _unpack_blocks() -> Any:
    """Tell transformers to turn GGUF blocks into ordinary, trainable weights; older releases always do."""
    kind = getattr(transformers, "GgufConfig", None)
    return None if kind is None else kind(dequantize=True)


def _reload_quantised(model: PreTrainedModel, dtype: torch.dtype, quantization: Any) -> PreTrainedModel:
    """Quantise weights that are already in memory, by way of a temporary folder."""
    with tempfile.TemporaryDirectory(prefix="lit_reason_") as folder:
        model.save_pretrained(folder)
        return type(model).from_pretrained(folder, dtype=dtype, quantization_config=quantization)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _config_from_fields(fields: dict[str, Any]) -> PreTrainedConfig:
    fields = copy.deepcopy(fields)
    kind = fields.pop("model_type", None)
    if kind not in CONFIG_MAPPING:
        hint = did_you_mean(str(kind), CONFIG_MAPPING.keys())
        raise UserError(f"model config: model_type is {kind!r}, which transformers does not know{hint}")
    _refuse_unknown(AutoConfig.for_model(kind), fields, "model config")
    with _config_errors("model config"):
        return AutoConfig.for_model(kind, **fields)


def _overridden(config: PreTrainedConfig, fields: dict[str, Any]) -> PreTrainedConfig:
    """A copy of `config` with fields changed; refuses names that the config does not have."""
    if not fields:
        return config
    _refuse_unknown(config, fields, "overrides")
    changed = config.to_dict()
    if "num_hidden_layers" in fields and "layer_types" not in fields:
        changed.pop("layer_types", None)  # one entry per layer; the config derives it again
    rope = changed.get("rope_parameters") or {}
    for name, value in fields.items():
        (rope if name in rope else changed)[name] = value
    with _config_errors("overrides"):
        return type(config).from_dict(changed)


def _refuse_unknown(config: PreTrainedConfig, fields: dict[str, Any], what: str) -> None:
    # Many families read head_dim without declaring it.
    known = {"head_dim", *config.to_dict(), *(getattr(config, "rope_parameters", None) or ())}
    for name in fields:
        if name not in known and not hasattr(config, name):
            raise UserError(f"{what}: {config.model_type} has no field '{name}'{did_you_mean(name, known)}")


@contextmanager
def _config_errors(what: str) -> Iterator[None]:
    try:
        yield
    except (StrictDataclassError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{what}: {' '.join(str(error).split())}") from error
