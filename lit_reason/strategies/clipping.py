"""Clipping by the norm of all gradients, of which some may be spread over processes in different ways."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


def total_norm(gradients: Iterable[Tensor]) -> Tensor:
    """The 2-norm of all gradients together, as one whole gradient would have it.

    Norms of tensors on different meshes (sharded once, sharded twice, not sharded) cannot be combined by torch
    itself. Here each mesh gives the norm of its own tensors, and `total = sqrt(sum_mesh norm_mesh^2)`.

    Args:
        gradients: plain tensors and DTensors; a plain one is taken to be equal on all processes.

    Returns:
        Scalar, equal on all processes, all of which must call this together.
    """
    by_mesh: dict[object, list[Tensor]] = defaultdict(list)
    for gradient in gradients:
        by_mesh[gradient.device_mesh if isinstance(gradient, DTensor) else None].append(gradient)
    norms = [torch.nn.utils.get_total_norm(tensors) for tensors in by_mesh.values()]
    whole = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    if len(whole) == 1:
        return whole[0]
    return torch.linalg.vector_norm(torch.stack(whole)) if whole else torch.zeros(())


@torch.no_grad()
def clip_norm(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """Scale gradients in place so that their total norm is at most `max_norm`.

    The factor is that of `torch.nn.utils.clip_grad_norm_`: `min(1, max_norm / (norm + 1e-6))`.

    Args:
        parameters: those with a gradient count.
        max_norm: the bound.

    Returns:
        The norm before.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = total_norm(gradients)
    factor = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
    for gradient in gradients:
        local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
        local.mul_(factor.to(local.device))
    return norm
