"""Rows laid end to end: which rows share a micro-batch, and the flat tensors they become.

Shape letters: T tokens of a pack, N rows in it, S trained tokens.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch

from lit_reason.data.token_row import TokenRow
from lit_reason.errors import UserError


@dataclass
class Pack:
    """One micro-batch: N rows end to end in one flat sequence of T tokens, without padding.

    Attributes:
        ids: `int64 [T]` tokens.
        positions: `int64 [T]` position inside its own row.
        cu_seqlens: `int32 [N+1]` where rows begin, and T.
        lengths: the N row lengths as plain integers, so that nobody reads them back from a device.
        weight: `float32 [T]`, `segment`: `uint8 [T]`, `decile`: `int8 [T]`, as in `TokenRow`.
        index: `int64 [S]` hidden rows that predict a trained token. The shift by one happens here and nowhere else.
        targets: `int64 [S]` the tokens they predict.
        target_weight: `float32 [S]` their loss weights.
        target_segment: `uint8 [S]`, `target_decile`: `int8 [S]` of the predicted tokens.
        row_ids: the N row ids.
        norm: summed loss weight of the whole optimizer step, over its micro-batches and all ranks.
        text_bytes: UTF-8 bytes of the text that the trained tokens stand for; 0 where nobody counted them.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    cu_seqlens: torch.Tensor
    lengths: tuple[int, ...]
    weight: torch.Tensor
    segment: torch.Tensor
    decile: torch.Tensor
    index: torch.Tensor
    targets: torch.Tensor
    target_weight: torch.Tensor
    target_segment: torch.Tensor
    target_decile: torch.Tensor
    row_ids: tuple[str, ...]
    norm: float
    text_bytes: int = 0

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """The same pack with its tensors on `device`."""
        moved: dict[str, Any] = {
            f.name: v.to(device, non_blocking=non_blocking)
            for f in dataclasses.fields(self)
            if isinstance(v := getattr(self, f.name), torch.Tensor)
        }
        return dataclasses.replace(self, **moved)


def pack_rows(rows: Sequence[TokenRow], norm: float | None = None, *, trained: bool = True) -> Pack:
    """Lay rows end to end.

    Args:
        rows: at least one row.
        norm: divisor of the loss (see `Pack.norm`); by default the summed weight of these rows.
        trained: False gives every token weight 0 (a stand-in that keeps all ranks in step).

    Returns:
        A pack of T = sum of the row lengths tokens.
    """
    lengths = tuple(len(row) for row in rows)
    weight = np.concatenate([row.weight for row in rows])
    if not trained:
        weight = np.zeros_like(weight)
    ids = torch.from_numpy(np.concatenate([row.ids for row in rows]).astype(np.int64))
    segment = torch.from_numpy(np.concatenate([row.segment for row in rows]))
    decile = torch.from_numpy(np.concatenate([row.decile for row in rows]))
    predicted = torch.from_numpy(np.flatnonzero(weight))
    weight_T = torch.from_numpy(weight)
    return Pack(
        ids=ids,
        positions=torch.from_numpy(np.concatenate([np.arange(n) for n in lengths])),
        cu_seqlens=torch.from_numpy(np.cumsum((0, *lengths), dtype=np.int32)),
        lengths=lengths,
        weight=weight_T,
        segment=segment,
        decile=decile,
        index=predicted - 1,  # a row's first token has weight 0, so this never reaches into the row before
        targets=ids[predicted],
        target_weight=weight_T[predicted],
        target_segment=segment[predicted],
        target_decile=decile[predicted],
        row_ids=tuple(row.row_id for row in rows),
        norm=float(weight.sum(dtype=np.float64)) if norm is None else norm,
        text_bytes=sum(row.text_bytes for row in rows) if trained else 0,
    )


def fill_bins(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing bin packing: rows are never split, a bin never holds more than `capacity` tokens.

    Args:
        lengths: tokens of each row.
        capacity: tokens a bin may hold.

    Returns:
        Row indices by bin; every row stands in exactly one.

    Raises:
        UserError: a row is longer than a bin.
    """
    order = np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable")
    if len(order) and lengths[order[0]] > capacity:
        raise UserError(
            f"data.batch_tokens is {capacity}, but a row has {lengths[order[0]]} tokens: "
            "raise batch_tokens or lower max_length"
        )
    bins: list[list[int]] = []
    open_bins: dict[int, list[int]] = defaultdict(list)  # room left -> bins with that room
    rooms: list[int] = []  # the keys of open_bins in order
    for row in order.tolist():
        need = int(lengths[row])
        at = bisect.bisect_left(rooms, need)
        if at == len(rooms):
            number, room = len(bins), capacity
            bins.append([])
        else:
            room = rooms[at]
            number = open_bins[room].pop()
            if not open_bins[room]:
                del open_bins[room], rooms[at]
        bins[number].append(row)
        left = room - need
        if left:
            if left not in open_bins:
                bisect.insort(rooms, left)
            open_bins[left].append(number)
    return bins
