"""A key/value cache whose rows grow by different amounts: slots, some of which are holes.

Shape letters: B rows, C slots, Q new slots, H key/value heads, d head width.

Rows of a multi-turn rollout never have equal lengths: one tool answers in ten tokens, another in two hundred. New
tokens are appended to all rows at once, padded on the right, and the padding stays in the cache as holes that nobody
attends to. Keys carry their rotary position already, so a hole costs room and changes no number. `select` closes them.

Rows that are done while others still write must cost nothing: `bring_forward` swaps rows so that those in use lie in
front, where a pass over them alone sees a part of the cache without copying it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers.cache_utils import Cache, DynamicLayer

from lit_reason.errors import UserError


class SlotLayer(DynamicLayer):
    """Keys and values of one decoder layer, in room that doubles instead of being copied for every token.

    Args:
        rows: number of rows.
    """

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.rows, self.used = rows, 0
        self._room: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append to the first R rows and return all their keys and values so far, each `[R, H, C, d]`.

        Args:
            key_states: `[R, H, Q, d]`; rows behind get a hole.
            value_states: `[R, H, Q, d]`.
            *args: what other kinds of cache need.
            **kwargs: the same.
        """
        first, self.used = self.used, self.used + key_states.shape[-2]
        if self._room is None or self._room[0].shape[-2] < self.used:
            self._room = tuple(
                _grown(old, new, self.rows, 2 * self.used)
                for old, new in zip(  # type: ignore[assignment]
                    self._room or (None, None), (key_states, value_states), strict=True
                )
            )
        for room, new in zip(self._room, (key_states, value_states), strict=True):  # type: ignore[arg-type]
            room[: len(new), :, first : self.used] = new
        return self._look(len(key_states))

    def rearrange(self, rows: Tensor, slots: Tensor) -> None:
        """Keep some rows, and of each some slots.

        Args:
            rows: `int64 [R]` rows to keep, in this order; one may come several times.
            slots: `int64 [R, C']` slots of each kept row, in this order.
        """
        self.rows = len(rows)
        if self._room is None:
            return
        at = slots[:, None, :, None]
        kept = []
        for room in self._room:
            chosen = room[rows]
            kept.append(chosen.gather(2, at.expand(-1, chosen.shape[1], -1, chosen.shape[3])))
        self._room, self.used = (kept[0], kept[1]), slots.shape[1]
        self._look(self.rows)

    def move(self, source: Tensor, target: Tensor) -> None:
        """Put rows in the places of others, all at once.

        Args:
            source: `int64` rows to read.
            target: `int64` rows to write.
        """
        for room in self._room or ():
            room[target, :, : self.used] = room[source, :, : self.used]

    def get_seq_length(self) -> int:
        """Number of slots, holes included."""
        return self.used

    def _look(self, rows: int) -> tuple[Tensor, Tensor]:
        assert self._room is not None
        self.is_initialized = True
        keys, values = (room[:rows, :, : self.used] for room in self._room)
        self.keys, self.values = keys, values
        return keys, values


class KVSlots:
    """The cache of B ragged rows of one model.

    Args:
        config: the model's configuration.
        rows: number of rows.
        device: where the model runs.

    Attributes:
        cache: what the model is given as `past_key_values`.
        order: which row lies in each place.
        mask_BC: whether a slot holds a token of the row in its place.
        length_B: tokens of the row in each place so far; the position of its next one.

    Raises:
        UserError: the model has layers that do not attend to all earlier tokens, for which a hole is not nothing.
    """

    def __init__(self, config: Any, rows: int, device: torch.device) -> None:
        text = config.get_text_config()
        kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
        if kinds != {"full_attention"} or getattr(text, "sliding_window", None):
            raise UserError(
                f"multi-turn rollouts need full attention in every layer; {type(text).__name__} has "
                f"{', '.join(sorted(kinds))} and a window of {getattr(text, 'sliding_window', None)}"
            )
        self._layers = [SlotLayer(rows) for _ in range(text.num_hidden_layers)]
        self.cache = Cache(layers=list(self._layers))
        self.order = list(range(rows))
        self.mask_BC = torch.zeros((rows, 0), dtype=torch.bool, device=device)
        self.length_B = torch.zeros(rows, dtype=torch.long, device=device)

    def bring_forward(self, rows: Sequence[int]) -> list[int]:
        """Swap rows until the given ones lie in the first places.

        Args:
            rows: which ones, each once.

        Returns:
            The same rows in the order in which they lie now.
        """
        wanted, R = set(rows), len(rows)
        inside = [place for place in range(R) if self.order[place] not in wanted]
        outside = [place for place in range(R, len(self.order)) if self.order[place] in wanted]
        if inside:
            device = self.mask_BC.device
            source, target = (torch.tensor(p, device=device) for p in (outside + inside, inside + outside))
            for layer in self._layers:
                layer.move(source, target)
            self.mask_BC[target], self.length_B[target] = self.mask_BC[source], self.length_B[source]
            for a, b in zip(inside, outside, strict=True):
                self.order[a], self.order[b] = self.order[b], self.order[a]
        return self.order[:R]

    def reserve(self, mask_RQ: Tensor) -> Tensor:
        """Announce new tokens of the first R rows; the model's next call fills their slots.

        Args:
            mask_RQ: which of the new slots hold a token; a row's tokens come first.

        Returns:
            `int64 [R, Q]` positions of the new tokens (of padding: the position before, which is harmless).
        """
        R, Q = mask_RQ.shape
        length_R = self.length_B[:R]
        positions_RQ = (length_R[:, None] + mask_RQ.cumsum(1) - 1).clamp(min=0)
        self.mask_BC = functional.pad(self.mask_BC, (0, Q))
        self.mask_BC[:R, -Q:] = mask_RQ
        self.length_B[:R] = length_R + mask_RQ.sum(1)
        return positions_RQ

    def select(self, rows: list[int]) -> None:
        """Keep some rows, in the given order, and close holes; a row given several times is copied.

        Args:
            rows: indices of the rows to keep.
        """
        place = {row: at for at, row in enumerate(self.order)}
        at = torch.tensor([place[row] for row in rows], dtype=torch.long, device=self.mask_BC.device)
        mask_RC = self.mask_BC[at]
        longest = int(mask_RC.sum(1).max()) if rows else 0
        # Stable: tokens of a row in their order, holes behind them.
        order_RC = (~mask_RC).to(torch.uint8).argsort(dim=1, stable=True)[:, :longest]
        for layer in self._layers:
            layer.rearrange(at, order_RC)
        self.mask_BC = mask_RC.gather(1, order_RC)
        self.length_B = self.length_B[at]
        self.order = list(range(len(rows)))


def _grown(old: Tensor | None, new: Tensor, rows: int, room: int) -> Tensor:
    """Room for `room` slots a row that begins with what `old` held."""
    grown = new.new_zeros((rows, new.shape[1], room, new.shape[-1]))
    if old is not None:
        grown[..., : old.shape[-2], :] = old
    return grown
