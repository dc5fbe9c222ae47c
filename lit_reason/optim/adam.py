"""Adam's direction for one tensor, for optimizers that apply it to something else than the gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def adam_direction(grad: Tensor, state: dict[str, Any], betas: tuple[float, float], eps: float) -> tuple[Tensor, float]:
    """Take a gradient into the moments and give Adam's direction, its bias correction apart.

    Args:
        grad: the gradient, or what stands for it, of any shape.
        state: holds `exp_avg`, `exp_avg_sq` and `step`; made here at the first call.
        betas: decay of the two moments.
        eps: added to the root of the second moment before its correction, as the low-rank optimizers were released.

    Returns:
        `m / (sqrt(v) + eps)` and `sqrt(1 - b2^t) / (1 - b1^t)`; their product is Adam's update for lr 1.
    """
    if "exp_avg" not in state:
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(grad), torch.zeros_like(grad)
    state.setdefault("step", torch.zeros(()))
    state["step"] += 1
    first, second, step = state["exp_avg"], state["exp_avg_sq"], int(state["step"])
    first.mul_(betas[0]).add_(grad, alpha=1 - betas[0])
    second.mul_(betas[1]).addcmul_(grad, grad, value=1 - betas[1])
    return first / second.sqrt().add_(eps), (1 - betas[1] ** step) ** 0.5 / (1 - betas[0] ** step)
