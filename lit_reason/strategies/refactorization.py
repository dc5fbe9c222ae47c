"""Refactorization of all low-rank layers of a model, on one process or spread over several.

* One process: layers of equal shape in batches.
* Copies on all processes (ddp): process i takes every layer j with j mod P = i and sends its factors to the others.
* Shards (fsdp2), route `gather`: P layers at a time are gathered, one process balances each, every process takes its
  rows back. Route `tsqr`: nothing is gathered (`kernels.refactorization.refactorize_sharded`).

Factors change in place: optimizers, buckets, hooks and compiled graphs keep the parameters they know.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from lit_reason.kernels.refactorization import refactorize, refactorize_sharded
from lit_reason.models.lowrank import LowRankLinear

BATCH_ENTRIES = 2**24  # factors of so many entries are computed at a time: 64 MiB in float32

Route = Literal["auto", "gather", "tsqr"]


class Balance(NamedTuple):
    """What the factors of one layer were like.

    Attributes:
        defect: `|B^T B - A^T A| / |B^T B|` before, in Frobenius norms.
        stable_rank: `|B A^T|_F^2 / |B A^T|_2^2`, between 1 and the rank.
    """

    defect: float
    stable_rank: float


@torch.no_grad()
def refactorize_layers(layers: Sequence[LowRankLinear], route: Route = "auto") -> list[Balance | None]:
    """Balance the factors of layers, in place. All processes of a run call this together.

    Args:
        layers: of one model.
        route: how shards are treated; `auto` is `tsqr` where it moves fewer numbers.

    Returns:
        One entry a layer, the same on all processes: None where its factors were left as they were, because an entry
        is not finite or the decomposition failed.

    Raises:
        RuntimeError: processes hold different factors afterwards.
    """
    if any(isinstance(layer.out_factor, DTensor) for layer in layers):
        return _in_shards(layers, route)
    if not (dist.is_available() and dist.is_initialized()):
        return _balance_here(layers)
    return _in_copies(layers)


# ---- one process -------------------------------------------------------------------------------------------------


class _New(NamedTuple):
    out_factor: Tensor
    in_factor: Tensor
    balance: Balance


def _balance_here(layers: Sequence[LowRankLinear]) -> list[Balance | None]:
    found: list[Balance | None] = [None] * len(layers)
    for number, new in _balanced([(layer.out_factor.detach(), layer.in_factor.detach()) for layer in layers]):
        layers[number].out_factor.copy_(new.out_factor)
        layers[number].in_factor.copy_(new.in_factor)
        found[number] = new.balance
    return found


def _balanced(pairs: Sequence[tuple[Tensor, Tensor]]) -> Iterator[tuple[int, _New]]:
    """Place and new factors of the pairs that have some; pairs of one shape are computed in batches."""
    by_shape: dict[tuple[torch.Size, torch.Size], list[int]] = defaultdict(list)
    for number, (b, a) in enumerate(pairs):
        if bool(b.isfinite().all()) and bool(a.isfinite().all()):
            by_shape[b.shape, a.shape].append(number)
    for shapes, numbers in by_shape.items():
        size = max(1, BATCH_ENTRIES // sum(shape.numel() for shape in shapes))
        for start in range(0, len(numbers), size):
            batch = numbers[start : start + size]
            for number, new in zip(batch, _balanced_batch([pairs[n] for n in batch]), strict=True):
                if new is not None:
                    yield number, new


def _balanced_batch(pairs: Sequence[tuple[Tensor, Tensor]]) -> list[_New | None]:
    b, a = (torch.stack(parts) for parts in zip(*pairs, strict=True))
    try:
        new_b, new_a = refactorize(b, a)
    except torch.linalg.LinAlgError:
        return [None] if len(pairs) == 1 else [new for pair in pairs for new in _balanced_batch([pair])]
    found: list[_New | None] = []
    for old_b, old_a, one_b, one_a in zip(b, a, new_b, new_a, strict=True):
        whole = bool(one_b.isfinite().all()) and bool(one_a.isfinite().all())
        balance = _balance(_gram(old_b), _gram(old_a), one_b.float().square().sum(0))
        found.append(_New(one_b, one_a, balance) if whole else None)
    return found


def _gram(factor: Tensor) -> Tensor:
    return factor.float().t() @ factor.float()


def _balance(out_gram: Tensor, in_gram: Tensor, singular: Tensor) -> Balance:
    """From the Gram matrices of the old factors and the singular values of the product."""
    size, largest = float(out_gram.norm()), float(singular.max())
    defect = float((out_gram - in_gram).norm()) / size if size else math.inf
    return Balance(defect, float((singular / largest).square().sum()) if largest else 0.0)


# ---- copies on all processes -------------------------------------------------------------------------------------


def _in_copies(layers: Sequence[LowRankLinear]) -> list[Balance | None]:
    rank, world = dist.get_rank(), dist.get_world_size()
    found = _from_all(_balance_here(layers[rank::world]), len(layers))
    for number, layer in enumerate(layers):
        if found[number] is not None:
            for factor in (layer.out_factor, layer.in_factor):
                dist.broadcast(factor.detach(), src=number % world)
    _compare([float(f.detach().double().sum()) for layer in layers for f in (layer.out_factor, layer.in_factor)])
    return found


def _from_all(own: list[Balance | None], count: int) -> list[Balance | None]:
    """What every process found out about its own layers, as one list of all `count` layers."""
    world = dist.get_world_size()
    parts: list[Any] = [None] * world
    dist.all_gather_object(parts, own)
    return [parts[number % world][number // world] for number in range(count)]


def _compare(checksums: list[float]) -> None:
    """Every process must have come to the same factors."""
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, [repr(value) for value in checksums])  # text, so that NaN equals NaN
    if any(part != parts[0] for part in parts):
        raise RuntimeError("after a refactorization the processes hold different factors; the last checkpoint stands")


# ---- shards ------------------------------------------------------------------------------------------------------


def _in_shards(layers: Sequence[LowRankLinear], route: Route) -> list[Balance | None]:
    found: list[Balance | None] = [None] * len(layers)
    by_route: dict[bool, list[int]] = defaultdict(list)
    for number, layer in enumerate(layers):
        fewer = layer.in_features + layer.out_features > 8 * layer.rank
        by_route[route == "tsqr" or (route == "auto" and fewer)].append(number)
    for number in by_route[True]:
        found[number] = _sharded(layers[number])
    world = dist.get_world_size()
    for start in range(0, len(by_route[False]), world):
        numbers = by_route[False][start : start + world]
        for number, balance in zip(numbers, _gathered([layers[n] for n in numbers]), strict=True):
            found[number] = balance
    return found


def _gathered(layers: Sequence[LowRankLinear]) -> list[Balance | None]:
    """At most as many layers as processes: whole factors everywhere, one process balances one layer."""
    rank = dist.get_rank()
    pairs = [(_whole(layer.out_factor), _whole(layer.in_factor)) for layer in layers]
    mine = next(_balanced(pairs[rank : rank + 1]), None)
    found = _from_all([None if mine is None else mine[1].balance], len(layers))
    for number, (layer, pair) in enumerate(zip(layers, pairs, strict=True)):
        if found[number] is None:
            continue
        new = mine[1] if mine is not None and number == rank else None
        for name, factor, place in (("out_factor", layer.out_factor, pair[0]), ("in_factor", layer.in_factor, pair[1])):
            if new is not None:
                place.copy_(getattr(new, name))
            dist.broadcast(place, src=number)
            _take_rows(factor, place)
    _compare([float(place.double().sum()) for pair in pairs for place in pair])
    return found


def _whole(factor: Any) -> Tensor:
    return factor.detach().full_tensor().contiguous()


def _take_rows(factor: Any, whole: Tensor) -> None:
    """Copy this process's rows of a whole factor into its shard; nothing is sent."""
    spread = DTensor.from_local(whole, factor.device_mesh, [Replicate()] * factor.device_mesh.ndim, run_check=False)
    factor.to_local().copy_(spread.redistribute(placements=factor.placements).to_local())


def _sharded(layer: LowRankLinear) -> Balance | None:
    out_factor: Any = layer.out_factor
    in_factor: Any = layer.in_factor
    if out_factor.device_mesh.ndim != 1 or out_factor.placements != (Shard(0),):
        raise RuntimeError(f"tsqr needs factors sharded by rows over one dimension, not {out_factor.placements}")
    group = out_factor.device_mesh.get_group()
    out_shard, in_shard = out_factor.to_local(), in_factor.to_local()
    try:
        new_out, new_in = refactorize_sharded(out_shard, in_shard, group)
    except torch.linalg.LinAlgError:
        return None
    sums = torch.stack([_gram(out_shard), _gram(in_shard), torch.diag(new_out.float().square().sum(0))])
    dist.all_reduce(sums, group=group)
    out_shard.copy_(new_out)
    in_shard.copy_(new_in)
    return _balance(sums[0], sums[1], sums[2].diagonal())
