"""Linear layers of low rank in place of dense ones, in any decoder; dense weights in, dense weights out.

Shapes: N inputs, M outputs, R rank, K nonzero entries of the sparse part.
"""

from __future__ import annotations

import json
import logging
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from lit_reason.errors import UserError, did_you_mean
from lit_reason.kernels.lowrank import block_edges, draw_positions, lowrank_linear, sparse_lowrank_linear
from lit_reason.kernels.refactorization import refactorize
from lit_reason.models.adapters import decoder_layers
from lit_reason.models.config import LowRankConfig, ModelConfig

log = logging.getLogger(__name__)

SETTINGS, FACTORS = "lowrank.json", "factors.safetensors"


class LowRankLinear(nn.Module):
    """`y = x W^T + bias` with `W = scale * B A^T + S`, S sparse or absent.

    Both factors are stored along their long side, so that sharding by rows cuts neither of them across the rank.

    Args:
        in_features: N.
        out_features: M.
        rank: R.
        scale: factor of the product, not trained.
        nonzeros: K, entries of S at random, fixed places; 0 for none.
        bias: bias of the layer it replaces, or None.
        transposed: the layer it replaces holds its weight as [N, M], as GPT-2 does.
        like: gives device and dtype.

    Attributes:
        out_factor: B, [M, R].
        in_factor: A, [N, R].
        values: entries of S, [K], or None.
        positions: where they are in S laid out row by row, ascending, [K], or None.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        scale: float,
        nonzeros: int,
        bias: nn.Parameter | None,
        transposed: bool,
        like: Tensor,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.scale, self.transposed = scale, transposed
        self.out_factor = nn.Parameter(like.new_empty(out_features, rank))
        self.in_factor = nn.Parameter(like.new_empty(in_features, rank))
        self.values = nn.Parameter(like.new_empty(nonzeros)) if nonzeros else None
        self.bias = bias
        positions = None
        if nonzeros and like.is_meta:
            positions = like.new_empty(nonzeros, dtype=torch.int32)
        elif nonzeros:
            positions = draw_positions(out_features, in_features, nonzeros).to(like.device)
        self.positions: Tensor | None
        self.register_buffer("positions", positions)
        self._edges: list[int] | None = None
        self.register_load_state_dict_post_hook(_forget_edges)

    @property
    def rank(self) -> int:
        """R."""
        return self.out_factor.shape[1]

    def forward(self, x: Tensor) -> Tensor:
        """[..., N] to [..., M]."""
        if self.values is None or self.positions is None:
            y = lowrank_linear(x, self.in_factor, self.out_factor, self.scale)
        else:
            if self._edges is None:
                self._edges = block_edges(self.positions, self.out_features, self.in_features)
            factors = (self.in_factor, self.out_factor, self.values, self.positions)
            y = sparse_lowrank_linear(x, *factors, self.scale, edges=self._edges)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    @torch.no_grad()
    def dense_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """W as the replaced layer holds it, summed in float32 or wider and rounded once.

        Args:
            dtype: of the result; None is that of the factors.
        """
        wide = torch.promote_types(self.out_factor.dtype, torch.float32)
        weight = self.scale * (self.out_factor.to(wide) @ self.in_factor.to(wide).t())
        if self.values is not None and self.positions is not None:
            weight.view(-1).index_add_(0, self.positions, self.values.to(wide))
        weight = weight.to(dtype or self.out_factor.dtype)
        return weight.t().contiguous() if self.transposed else weight

    @torch.no_grad()
    def draw(self, out_factor_zero: bool) -> None:
        """Random factors: entries of A within 1/sqrt(N), of B within 1/sqrt(R) or zero, of S within 1/sqrt(N).

        Args:
            out_factor_zero: start B at zero, as SLTrain does.
        """
        self.in_factor.uniform_(-(self.in_features**-0.5), self.in_features**-0.5)
        if out_factor_zero:
            self.out_factor.zero_()
        else:
            self.out_factor.uniform_(-(self.rank**-0.5), self.rank**-0.5)
        if self.values is not None:
            self.values.uniform_(-(self.in_features**-0.5), self.in_features**-0.5)

    @torch.no_grad()
    def approximate(self, weight: Tensor) -> None:
        """Take the best factors of a dense weight, balanced, and as S what they miss at its places.

        The singular vectors of the shorter side come from the eigenvectors of a Gram matrix in float64, which takes a
        fraction of the time of the whole decomposition.

        Args:
            weight: [M, N], or [N, M] where `transposed`.
        """
        wanted_MN = (weight.t() if self.transposed else weight).double()
        if self.out_features <= self.in_features:
            basis = torch.linalg.eigh(wanted_MN @ wanted_MN.t())[1][:, -self.rank :]
            out_factor, in_factor = refactorize(basis, wanted_MN.t() @ basis)
        else:
            basis = torch.linalg.eigh(wanted_MN.t() @ wanted_MN)[1][:, -self.rank :]
            out_factor, in_factor = refactorize(wanted_MN @ basis, basis)
        self.out_factor.copy_(out_factor * self.scale**-0.5)
        self.in_factor.copy_(in_factor * self.scale**-0.5)
        if self.values is not None and self.positions is not None:
            missed = wanted_MN - out_factor @ in_factor.t()
            self.values.copy_(missed.flatten().index_select(0, self.positions))

    def extra_repr(self) -> str:
        """Sizes, as `nn.Linear` prints them."""
        sparse = 0 if self.values is None else self.values.numel()
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, "
            f"scale={self.scale:g}, sparse={sparse}, bias={self.bias is not None}"
        )


def _forget_edges(module: nn.Module, _: Any) -> None:
    module._edges = None  # type: ignore[assignment]


def lowrank_layers(model: nn.Module) -> Iterator[tuple[str, LowRankLinear]]:
    """The low-rank layers of a model by name, in order."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, LowRankLinear))


def make_lowrank(model: PreTrainedModel, config: LowRankConfig, *, from_weights: bool) -> None:
    """Replace linear layers by low-rank ones, in place and one after the other.

    New weights come from the global random stream. Embeddings, norms and the output layer stay as they are.

    Args:
        model: a transformers decoder.
        config: rank, scale, first weights, layers.
        from_weights: the model's weights mean something: `init: auto` approximates them.

    Raises:
        UserError: a setting cannot work with this model; nothing was changed.
    """
    layers = _chosen(model, config)
    _check(config, layers)
    _refuse_tied(model, layers)
    init = config.init
    if init == "auto":
        init = "svd" if from_weights else "zero" if config.sparse_density else "kaiming"
    dense = sum(layer.weight.numel() for layer in layers.values())
    for name, layer in layers.items():
        out_features, in_features = _sides(layer)
        fresh = LowRankLinear(
            in_features,
            out_features,
            config.rank,
            config.alpha / config.rank,
            math.floor(config.sparse_density * out_features * in_features),
            layer.bias,
            _is_transposed(layer),
            layer.weight,
        )
        if not layer.weight.is_meta:
            fresh.approximate(layer.weight) if init == "svd" else fresh.draw(init == "zero")
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, fresh)
    held = sum(p.numel() for _, layer in lowrank_layers(model) for n, p in layer.named_parameters() if n != "bias")
    said = log.warning if held > dense else log.info
    said("%d linear layers of rank %d: %s weights instead of %s", len(layers), config.rank, f"{held:,}", f"{dense:,}")


def hidden_matrices(model: PreTrainedModel) -> tuple[list[tuple[int, int]], int]:
    """The attention and MLP matrices of a model, dense or low-rank.

    Args:
        model: a transformers decoder without adapter.

    Returns:
        Outputs and inputs of each, and the number of parameters that hold all of them.
    """
    sides, held = [], 0
    for layer in (module for block in decoder_layers(model) for module in block.modules()):
        if isinstance(layer, LowRankLinear):
            sides.append((layer.out_features, layer.in_features))
        elif _is_linear(layer):
            sides.append(_sides(layer))
        else:
            continue
        held += sum(p.numel() for name, p in layer.named_parameters() if name != "bias")
    return sides, held


def _chosen(model: PreTrainedModel, config: LowRankConfig) -> dict[str, Any]:
    """The dense layers that the targets name."""
    inside = {id(module) for layer in decoder_layers(model) for module in layer.modules()}
    linear = {name: module for name, module in model.named_modules() if _is_linear(module)}
    head = model.get_output_embeddings()
    if config.targets == "all-linear":
        return {name: module for name, module in linear.items() if id(module) in inside}
    wanted = [config.targets] if isinstance(config.targets, str) else list(config.targets)
    chosen: dict[str, Any] = {}
    for target in wanted:
        matched = {name: module for name, module in linear.items() if target and target in name}
        if not matched:
            words = sorted({word for name in linear for word in name.split(".") if not word.isdigit()})
            raise UserError(
                f"lowrank.targets: no linear layer has '{target}' in its path{did_you_mean(target, words)}; "
                f"their paths have {', '.join(words)}"
            )
        if any(module is head for module in matched.values()):
            raise UserError(f"lowrank.targets: '{target}' matches the output layer, which stays dense")
        chosen |= matched
    return {name: module for name, module in linear.items() if name in chosen}


def _check(config: LowRankConfig, layers: dict[str, Any]) -> None:
    if config.rank < 1:
        raise UserError(f"lowrank.rank is {config.rank}; it must be at least 1")
    if not (config.alpha > 0 and math.isfinite(config.alpha)):
        raise UserError(f"lowrank.alpha is {config.alpha}; it must be positive")
    if not 0 <= config.sparse_density < 1:
        raise UserError(f"lowrank.sparse_density is {config.sparse_density}; it is a share, at least 0 and below 1")
    if not layers:
        raise UserError("lowrank.targets: empty, or this model has no linear layer in its decoder layers")
    for name, layer in layers.items():
        if layer.weight.dtype in (torch.uint8, torch.int8):
            raise UserError(f"lowrank: {name} is quantised; low-rank layers are made from plain ones")
        if config.rank > min(layer.weight.shape):
            out_features, in_features = _sides(layer)
            raise UserError(
                f"lowrank.rank is {config.rank}, but {name} is {out_features} x {in_features}: the rank may be at most "
                f"{min(out_features, in_features)} there; lower it, or leave the layer out of lowrank.targets"
            )


def _refuse_tied(model: PreTrainedModel, layers: dict[str, Any]) -> None:
    names = list(model.named_parameters(remove_duplicate=False))
    uses = Counter(id(parameter) for _, parameter in names)
    for name, layer in layers.items():
        if uses[id(layer.weight)] > 1:
            other = next(n for n, p in names if p is layer.weight and n != f"{name}.weight")
            raise UserError(
                f"lowrank.targets: {name} shares its weight with {other.removesuffix('.weight')}; a tied layer cannot "
                "be made low-rank, leave it out of lowrank.targets"
            )


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or _is_transposed(module)


def _is_transposed(module: nn.Module) -> bool:
    """Whether this is transformers' Conv1D (GPT-2), a linear layer that holds its weight as [inputs, outputs]."""
    return type(module).__name__ == "Conv1D"


def _sides(layer: Any) -> tuple[int, int]:
    """Outputs and inputs."""
    first, second = layer.weight.shape
    return (second, first) if _is_transposed(layer) else (first, second)


# ---- factored folders ------------------------------------------------------------------------------------------------


def factored_folder(config: ModelConfig) -> Path | None:
    """The folder that `config.path` names, if it is one that `save_factored` wrote."""
    folder = Path(config.path).expanduser() if config.path else None
    return folder if folder is not None and (folder / SETTINGS).is_file() else None


def save_factored(model: PreTrainedModel, config: LowRankConfig, folder: Path) -> None:
    """Write factors as they are: a folder that `lm.path` takes, smaller than the dense weights by the rank.

    The weights have a file name of their own, so that a loader that knows only dense models refuses the folder instead
    of filling in random weights.

    Args:
        model: after `make_lowrank`.
        config: the settings it was made with.
        folder: an existing folder.
    """
    model.config.save_pretrained(folder)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    tensors = {name: p.detach().contiguous() for name, p in model.named_parameters()}  # tied ones once
    buffers = {name: b for name, b in model.named_buffers() if name in model.state_dict()}
    save_file({**tensors, **buffers}, folder / FACTORS, metadata={"format": "pt"})
    named = replace(config, targets=[name for name, _ in lowrank_layers(model)], init="auto")
    (folder / SETTINGS).write_text(json.dumps(asdict(named), indent=2) + "\n", encoding="utf-8")


def factored_settings(folder: Path, given: LowRankConfig | None) -> LowRankConfig:
    """The settings in a factored folder.

    Args:
        folder: as `save_factored` wrote it.
        given: what the recipe says, or None to take what is there.

    Raises:
        UserError: the recipe says something else.
    """
    found = LowRankConfig(**json.loads((folder / SETTINGS).read_text(encoding="utf-8")))
    for name in ("rank", "alpha", "sparse_density") if given is not None else ():
        if getattr(given, name) != getattr(found, name):
            raise UserError(
                f"lowrank.{name} is {getattr(given, name)}, but {folder} holds factors with {getattr(found, name)}; "
                "leave lowrank out to take the folder's settings, or export it dense and start from that"
            )
    return found


def load_factors(model: PreTrainedModel, folder: Path) -> None:
    """Read the weights of a factored folder into a model with the same low-rank layers.

    Args:
        model: after `make_lowrank` with the folder's settings.
        folder: as `save_factored` wrote it.

    Raises:
        UserError: the file is missing, or its names or shapes are not this model's.
    """
    if not (folder / FACTORS).is_file():
        raise UserError(f"model path: {folder} has {SETTINGS}, but {FACTORS} is missing")
    tensors = load_file(folder / FACTORS)
    once = {name for name, _ in model.named_parameters()}
    shared = {name for name, _ in model.named_parameters(remove_duplicate=False)} - once
    try:
        missing, unexpected = model.load_state_dict(tensors, strict=False)
    except RuntimeError as error:
        raise UserError(f"model path: {folder}: {str(error).strip().splitlines()[-1].strip()}") from error
    wrong = sorted((set(missing) - shared) | set(unexpected))
    if wrong:
        raise UserError(f"model path: {folder} does not hold the weights of its own config: {', '.join(wrong[:3])}")
