"""A file of directions: safetensors with what they came from, and the export that llama.cpp and repeng read.

Shape letters: D width, s tokens of a segment, K classes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

import lit_reason
from lit_reason.data.reading.row_files import complete_or_absent
from lit_reason.errors import UserError, did_you_mean
from lit_reason.steering.probe import Probe

FORMAT = 1
HOOK_POINT = "block_output"  # what a decoder layer returns; layers count from 0
SKETCH_ROWS = 16
SKETCH_TOLERANCE = 0.01  # half precision moves a row's length by a thousandth


@dataclass(frozen=True)
class Directions:
    """Directions of one layer of one model.

    Attributes:
        vectors: by name, float32 `[D]`, or `[s, D]` for a segment laid over the prompt.
        layer: decoder layer whose output they belong to, from 0.
        residual_norm: median length of that layer's states where the directions were found.
        probe: on that layer's features; None where none was fitted.
        facts: where they come from, as plain values: model, method, counts, thresholds, data.
    """

    vectors: Mapping[str, Tensor]
    layer: int
    residual_norm: float
    probe: Probe | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """Of the directions, in the order of the probe's classes."""
        return list(self.facts.get("classes", self.vectors))

    @property
    def width(self) -> int:
        """D."""
        return next(iter(self.vectors.values())).shape[-1]

    @property
    def laid_from(self) -> int:
        """Position of a row at which a direction of several tokens begins: where it was read, for ActAdd the front."""
        return 0 if self.facts.get("method") == "act_add" else int(self.facts.get("first", 0))

    def get(self, name: str) -> Tensor:
        """A direction by name.

        Args:
            name: of the direction.

        Raises:
            UserError: there is none of that name.
        """
        if name not in self.vectors:
            known = ", ".join(self.vectors)
            raise UserError(f"no direction is called '{name}'{did_you_mean(name, self.vectors)}; the file has: {known}")
        return self.vectors[name]


def model_facts(base: Any, path: str | None = None) -> dict[str, Any]:
    """What tells a model from another: its shape, and the lengths of some rows of its embedding.

    Args:
        base: a transformers model, without a peft wrapper. All processes call this together where it is sharded.
        path: where it came from, for people to read.
    """
    config = base.config.get_text_config()
    weight = base.get_input_embeddings().weight.detach()
    weight = weight.full_tensor() if isinstance(weight, DTensor) else weight
    rows = torch.linspace(0, len(weight) - 1, SKETCH_ROWS).long()
    shape = {name: getattr(config, name, None) for name in ("hidden_size", "num_hidden_layers", "vocab_size")}
    lengths = weight[rows.to(weight.device)].float().norm(dim=-1)
    return {"id": path, "model_type": config.model_type, **shape, "sketch": [round(float(x), 6) for x in lengths]}


def check_model(directions: Directions, here: Mapping[str, Any], other_weights: bool = False) -> None:
    """Refuse directions of another model.

    A model that was fine-tuned from the file's one, quantised or given an adapter keeps its embedding nearly as it was,
    and passes.

    Args:
        directions: from a file.
        here: `model_facts` of the model to be steered.
        other_weights: accept other weights of the same shape.

    Raises:
        UserError: width, number of layers, kind or weights differ.
    """
    there = directions.facts.get("model", {})
    if directions.width != here["hidden_size"]:
        raise UserError(
            f"the directions are {directions.width} wide and belong to {_called(there)}; this model is "
            f"{here['hidden_size']} wide ({_called(here)})"
        )
    for name in ("model_type", "num_hidden_layers", "vocab_size"):
        if name in there and there[name] != here[name]:
            raise UserError(
                f"the directions belong to another model, {_called(there)}: its {name} is {there[name]}, here it is "
                f"{here[name]} ({_called(here)})"
            )
    pairs = list(zip(there.get("sketch", ()), here["sketch"], strict=False))
    far = max((abs(a - b) / max(abs(a), 1e-6) for a, b in pairs), default=0.0)
    if far > SKETCH_TOLERANCE and not other_weights:
        raise UserError(
            f"the directions belong to other weights of this shape, {_called(there)}, not to {_called(here)}: rows of "
            f"the embedding differ by {far:.0%}. Set other_weights to true to add them all the same"
        )


def _called(facts: Mapping[str, Any]) -> str:
    return str(facts.get("id") or facts.get("model_type") or "an unnamed model")


def save_directions(directions: Directions, path: Path) -> None:
    """Write the file, whole or not at all.

    Args:
        directions: what to write.
        path: a `.safetensors` file; its folder is made.
    """
    tensors = {f"direction.{k}.layer_{directions.layer}": v.contiguous() for k, v in directions.vectors.items()}
    tensors["residual_norm"] = torch.tensor(directions.residual_norm)
    if directions.probe is not None:
        tensors |= {"probe.weight": directions.probe.weight_KF, "probe.bias": directions.probe.bias_K}
    facts = {
        "format_version": FORMAT,
        "library_version": lit_reason.__version__,
        "hook_point": HOOK_POINT,
        "layer_index_base": 0,
        "layer": directions.layer,
        **directions.facts,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with complete_or_absent(path) as unfinished:
        save_file(tensors, unfinished, metadata={k: json.dumps(v, sort_keys=True) for k, v in facts.items()})


def read_directions(path: str | Path) -> Directions:
    """Read a file of directions.

    Args:
        path: as `save_directions` wrote it.

    Raises:
        UserError: there is no such file, it is damaged, or it is something else.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        beside = [p.name for p in file.parent.glob("*.safetensors")] if file.parent.is_dir() else []
        raise UserError(f"directions: {path} does not exist{did_you_mean(file.name, beside)}")
    try:
        with safe_open(file, "pt") as opened:
            facts = {name: json.loads(value) for name, value in (opened.metadata() or {}).items()}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  (no mapping)
    except (SafetensorError, ValueError, OSError) as error:
        raise UserError(f"directions: cannot read {path}: {' '.join(str(error).split())}") from error
    if facts.get("hook_point") != HOOK_POINT or not any(name.startswith("direction.") for name in tensors):
        raise UserError(
            f"directions: {path} holds no directions at {HOOK_POINT}; it has {', '.join(list(tensors)[:4])}"
        )
    if facts.get("format_version") != FORMAT:
        raise UserError(f"directions: {path} has format {facts.get('format_version')}, this version reads {FORMAT}")
    ending = f".layer_{facts['layer']}"
    vectors = {k.removeprefix("direction.").removesuffix(ending): v for k, v in tensors.items() if k.endswith(ending)}
    order = [name for name in facts.get("classes", ()) if name in vectors] or sorted(vectors)
    probe = Probe(tensors["probe.weight"], tensors["probe.bias"]) if "probe.weight" in tensors else None
    ordered = {name: vectors[name] for name in order}
    return Directions(ordered, facts["layer"], float(tensors["residual_norm"]), probe, facts)


def check_gguf(layers: Sequence[int], names: Sequence[str], one_token: bool = True) -> None:
    """Refuse what no control vector can say; nothing is read or written for it.

    Args:
        layers: at which the directions are, or may come to be.
        names: of the directions; each becomes the name of a file.
        one_token: whether a direction is one vector, and not several laid over a prompt.

    Raises:
        UserError: the gguf package is missing, layer 0 is among the layers, a direction has several tokens, or its name
            cannot be that of a file.
    """
    if find_spec("gguf") is None:
        raise UserError("writing a GGUF control vector needs the gguf package: pip install 'lit-reason[gguf]'")
    if 0 in layers:
        raise UserError(
            "a GGUF control vector cannot be at layer 0, for llama.cpp steers layers from 1 on: set direction.layer or "
            "direction.layers without it, or leave model.gguf out"
        )
    if not one_token:
        raise UserError(
            "a GGUF control vector has one token, and these directions cover several: set direction.segment to token "
            "or mean and direction.method to another than act_add, or leave model.gguf out"
        )
    for name in names:
        if Path(name).name != name:
            raise UserError(f"a GGUF control vector is named after its label, and '{name}' cannot name a file")


def export_gguf(directions: Directions, folder: Path) -> list[Path]:
    """Write each direction as a control vector for llama.cpp (`--control-vector-scaled FILE SCALE`) and repeng.

    The vector is one tensor `direction.<layer>` with the same layer number as here: llama.cpp adds it to the output of
    that layer, and cannot steer layer 0. It is as long as the median state of the layer, so that SCALE is the strength.

    Args:
        directions: one vector a name; a segment of several tokens has no place in this format.
        folder: gets `<name>.gguf`.

    Returns:
        The files.

    Raises:
        UserError: see `check_gguf`.
    """
    check_gguf([directions.layer], list(directions.vectors), all(v.ndim == 1 for v in directions.vectors.values()))
    import gguf

    files = []
    folder.mkdir(parents=True, exist_ok=True)
    for name, vector in directions.vectors.items():
        scaled = vector * (directions.residual_norm / vector.norm())
        target = folder / f"{name}.gguf"
        with complete_or_absent(target) as unfinished:
            writer = gguf.GGUFWriter(unfinished, "controlvector")
            writer.add_string("controlvector.model_hint", str(directions.facts["model"]["model_type"]))
            writer.add_uint32("controlvector.layer_count", 1)
            writer.add_tensor(f"direction.{directions.layer}", scaled.float().numpy())
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
        files.append(target)
    return files


def cosines(vectors: Sequence[Tensor]) -> Iterator[tuple[int, int, float]]:
    """Cosine of every two directions, as (first, second, cosine)."""
    for i, a in enumerate(vectors):
        for j in range(i + 1, len(vectors)):
            if a.shape == vectors[j].shape:
                yield i, j, float((a * vectors[j]).sum() / (a.norm() * vectors[j].norm()))
