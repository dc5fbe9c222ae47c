"""Adding directions to a running model: which positions get them, how long they are, and in whose rows.

Shape letters: B rows, T positions of this pass, D width, K directions, s tokens of a segment.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from lit_reason.errors import UserError
from lit_reason.steering.collect import chosen_layers, output_states
from lit_reason.steering.config import SteerConfig
from lit_reason.steering.direction_file import Directions, check_model, model_facts

CANCELLED = 0.5**0.5  # one is told of a sum shorter than this share of what it were at right angles: a cosine of -0.5


class SteeringHook:
    """Adds a mix of directions to the output of one decoder layer, for as long as it is attached.

    All state is here, none in the model: detached, the model computes exactly what it did. Use it as a context, or
    `attach` and `detach`. One forward pass may be a prompt with left padding, a step with a KV cache, or packed rows
    whose position ids restart; rows that are padded get nothing where the padding is.

    Args:
        base: a transformers model, without a peft wrapper around it.
        directions: from a file.
        config: what is added, how much of it and where.

    Attributes:
        passes: forward passes so far in which the layer ran while attached.
        generated_BT: for passes without a KV cache, which positions count as generation; needed unless `phases` is all.

    Raises:
        UserError: the directions belong to another model, a name or a setting is wrong, or there is no strength.
    """

    def __init__(self, base: Any, directions: Directions, config: SteerConfig) -> None:
        check_model(directions, model_facts(base), config.other_weights)
        check_steering(config)
        self.base, self.directions, self.config = base, directions, config
        (self.layer,) = chosen_layers(base, [directions.layer])
        self.passes = 0
        self.generated_BT: Tensor | None = None
        self._handles: list[Any] = []
        self._names = list(inspect.signature(base.base_model.forward).parameters)
        self._pass: dict[str, Any] = {}
        self.set_mix(config.mix)

    # ---- what is added ----

    def set_mix(self, mix: Mapping[str, float]) -> None:
        """Add the same mix to all rows from now on.

        Args:
            mix: weights by name of direction.

        Raises:
            UserError: there is no direction of a name.
        """
        self._by_row = False
        self._use(list(mix), torch.tensor([[float(w) for w in mix.values()]]))

    def set_rows(self, mixes: Sequence[Mapping[str, float]]) -> None:
        """Add a mix of its own to each row of the batches to come.

        Args:
            mixes: one a row; rows of a packed pass are its documents, in order.

        Raises:
            UserError: there is no direction of a name.
        """
        names = list(dict.fromkeys(name for mix in mixes for name in mix))
        self._by_row = True
        self._use(names, torch.tensor([[float(mix.get(name, 0.0)) for name in names] for mix in mixes]))

    def _use(self, names: list[str], weights_BK: Tensor) -> None:
        if names:
            parts = torch.stack([self._scaled(self.directions.get(name)) for name in names])  # [K, D] or [K, s, D]
            sums_B = torch.einsum("bk,k...->b...", weights_BK, parts)
            _tell_of_cancelling(names, weights_BK * parts.flatten(1).norm(dim=-1), sums_B.flatten(1).norm(dim=-1))
        else:
            sums_B = torch.zeros(len(weights_BK), self.directions.width)
        self._vectors_B = self._capped(sums_B * self.strength)
        self._placed: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    @property
    def strength(self) -> float:
        """The factor on the mix: the configured one, else the file's.

        Raises:
            UserError: there is neither, or the file's is in another unit.
        """
        facts, unit = self.directions.facts, self.config.unit
        if self.config.strength is not None:
            return self.config.strength
        if facts.get("strength") is None or facts.get("unit") != unit:
            raise UserError(
                f"steering: strength is missing, and the file has none of its own in the unit {unit}; for "
                "residual_norm, 0.1 to 0.3 is a good begin"
            )
        return float(facts["strength"])

    def _scaled(self, vector: Tensor) -> Tensor:
        if self.config.unit == "raw":
            return vector
        pieces = len(vector) if vector.ndim == 2 else 1
        return vector * (self.directions.residual_norm * math.sqrt(pieces) / vector.norm())

    def _capped(self, vectors_B: Tensor) -> Tensor:
        if self.config.max_norm is None:
            return vectors_B
        limit = self.config.max_norm * self.directions.residual_norm
        return vectors_B * (limit / vectors_B.norm(dim=-1, keepdim=True).clamp_min(1e-12)).clamp_max(1.0)

    # ---- being there ----

    def attach(self) -> Self:
        """Begin to steer."""
        if not self._handles:
            watch = self.base.base_model.register_forward_pre_hook(self._begin, with_kwargs=True)
            self._handles = [watch, self.layer.register_forward_hook(self._add)]
        return self

    def detach(self) -> None:
        """Stop, and leave nothing behind."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._pass = [], {}

    def __enter__(self) -> Self:
        return self.attach()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.detach()

    # ---- a forward pass ----

    def _begin(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        given = {**dict(zip(self._names, args, strict=False)), **kwargs}
        cache = given.get("past_key_values")
        self._pass = {
            "mask": given.get("attention_mask"),
            "positions": given.get("position_ids"),
            "cached": cache is not None,
            "past": cache.get_seq_length() if cache is not None else 0,
        }
        mask = self._pass["mask"]
        if mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 2):
            raise UserError(
                "steering: the attention mask of this pass is none of rows and tokens, so that nothing says where its "
                "padding is; call the model with a mask of two dimensions"
            )

    def _add(self, module: nn.Module, args: tuple, output: Any) -> Any:
        hidden_BTD = output_states(output)
        self.passes += 1
        chosen_BT = self._chosen(hidden_BTD)
        if chosen_BT is False:
            return output
        added = self._vector_at(hidden_BTD)
        if isinstance(chosen_BT, Tensor):
            added = added * chosen_BT[..., None].to(hidden_BTD.dtype)
        steered_BTD = hidden_BTD + added
        if self.config.keep_norm:
            lengths = hidden_BTD.norm(dim=-1, keepdim=True) / steered_BTD.norm(dim=-1, keepdim=True).clamp_min(1e-12)
            kept_BTD = steered_BTD * lengths
            steered_BTD = (
                kept_BTD if not isinstance(chosen_BT, Tensor) else hidden_BTD.where(~chosen_BT[..., None], kept_BTD)
            )
        return (steered_BTD, *output[1:]) if isinstance(output, tuple) else steered_BTD

    def _positions(self, hidden_BTD: Tensor) -> Tensor:
        """Position of each state among the real tokens of its row, `[B or 1, T]`."""
        steps, mask, given = hidden_BTD.shape[1], self._pass["mask"], self._pass["positions"]
        if mask is not None:
            return (mask.long().cumsum(-1) - 1)[:, -steps:]
        if given is not None:
            return given
        return (torch.arange(steps, device=hidden_BTD.device) + self._pass["past"])[None]

    def _chosen(self, hidden_BTD: Tensor) -> Tensor | bool:
        """Which positions are steered: a mask `[B or 1, T]`, True for all, False for none."""
        config, mask, steps = self.config, self._pass["mask"], hidden_BTD.shape[1]
        one_by_one = self._pass["past"] > 0 and steps == 1
        chosen: Tensor | bool = True
        if config.phases != "all":
            if self._pass["cached"]:
                if one_by_one != (config.phases == "generation"):
                    return False
            elif self.generated_BT is None:
                raise UserError(
                    f"steering: phases is {config.phases}, and nothing says which tokens of this pass are generated: "
                    "generate with a KV cache, or set phases to all"
                )
            else:
                chosen = self.generated_BT.to(hidden_BTD.device) == (config.phases == "generation")
        if mask is not None and not one_by_one:
            chosen = chosen & mask[:, -steps:].bool()
        if config.first_position > 0 or config.last_position is not None:
            at = self._positions(hidden_BTD)
            chosen = chosen & (at >= config.first_position)
            if config.last_position is not None:
                chosen = chosen & (at <= config.last_position)
        return chosen

    def _vector_at(self, hidden_BTD: Tensor) -> Tensor:
        """What is added at each position, `[B or 1, T or 1, D]`, in the states' dtype."""
        key = hidden_BTD.device, hidden_BTD.dtype
        if key not in self._placed:
            self._placed[key] = self._vectors_B.to(hidden_BTD.device, hidden_BTD.dtype)
        vectors_B = self._placed[key]
        if not self._by_row and vectors_B.ndim == 2:
            return vectors_B[:, None]
        rows = self._rows(hidden_BTD, len(vectors_B)) if self._by_row else torch.zeros_like(self._positions(hidden_BTD))
        if vectors_B.ndim == 2:
            return vectors_B[rows]
        piece = self._positions(hidden_BTD) - self.directions.laid_from
        inside = (piece >= 0) & (piece < vectors_B.shape[1])
        return vectors_B[rows, piece.clamp(0, vectors_B.shape[1] - 1)] * inside[..., None].to(hidden_BTD.dtype)

    def _rows(self, hidden_BTD: Tensor, count: int) -> Tensor:
        """Which mix each position has, `[B, T or 1]`."""
        batch = hidden_BTD.shape[0]
        if batch == count:
            return torch.arange(count, device=hidden_BTD.device)[:, None].expand(-1, hidden_BTD.shape[1])
        if batch == 1 and self._pass["positions"] is not None:
            rows = (self._pass["positions"] == 0).cumsum(-1) - 1
            if int(rows.max()) + 1 == count:
                return rows
        raise UserError(
            f"steering: {count} mixes were set for rows, and this pass has other rows ({batch} in the batch)"
        )


def _tell_of_cancelling(names: Sequence[str], lengths_BK: Tensor, found_B: Tensor) -> None:
    """Warn of the first mix whose directions take much of each other away.

    Args:
        names: of the directions.
        lengths_BK: length of each direction as weighted.
        found_B: length of each mix's sum.
    """
    free_B = lengths_BK.norm(dim=-1)  # of the sum, were all at right angles
    for row in (found_B < CANCELLED * free_B).nonzero()[:1, 0].tolist():
        mixed = ", ".join(name for name, length in zip(names, lengths_BK[row], strict=True) if length)
        warnings.warn(
            f"directions pull apart: with these weights, the sum of {mixed} is {float(found_B[row] / free_B[row]):.0%} "
            "as long as if they had nothing to do with each other",
            stacklevel=2,
        )


def check_steering(config: SteerConfig) -> None:
    """Refuse settings that cannot be meant.

    Args:
        config: how directions are added.

    Raises:
        UserError: a number is out of its range.
    """
    values = {"strength": config.strength, "max_norm": config.max_norm, **config.mix}
    for name, value in values.items():
        if value is not None and not math.isfinite(value):
            raise UserError(f"steering: {name} is {value}; it must be a finite number")
    if config.max_norm is not None and config.max_norm <= 0:
        raise UserError(f"steering: max_norm is {config.max_norm}; it must be above 0")
    last = config.last_position
    if config.first_position < 0 or (last is not None and last < config.first_position):
        raise UserError(f"steering: positions {config.first_position} to {last} are no range from 0 on")
