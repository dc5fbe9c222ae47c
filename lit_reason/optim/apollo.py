"""APOLLO and APOLLO-Mini: the raw gradient, scaled channel by channel as Adam would in a random subspace.

Zhu et al., arXiv 2412.05270; written from the paper's algorithm alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lit_reason.optim.subspace import TINY, Projected, SubspaceAdam, channel_scale, limit_growth


class Apollo(SubspaceAdam):
    """Update = `sqrt(scale) * s_j * G_j` for channel j, `s_j = |psi(R)_j| / |R_j|`, R = P G, P entries N(0, 1 / R).

    The norm of the update may grow by 1 % a step. P is drawn again from its seed at every step, so it takes no
    memory between steps.

    Args:
        params: matrices.
        per_tensor: one s for the whole matrix instead of one a channel (APOLLO-Mini, with rank 1).
        seed: of the subspaces.
        **settings: as in `SubspaceAdam`.
    """

    def __init__(self, params: Any, *, per_tensor: bool = False, seed: int = 0, **settings: Any) -> None:
        super().__init__(params, **settings)
        self.per_tensor = per_tensor
        for group in self.param_groups:
            group.setdefault("seed", seed)

    def basis(self, grad: Tensor, step: int, number: int, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        """Random rows for this matrix and period; the arguments are those of `SubspaceAdam.basis`."""
        period = step // group["refresh_steps"]
        source = torch.Generator(grad.device).manual_seed(hash((group["seed"], number, period)) % 2**63)
        shape = (group["rank"], min(grad.shape))
        drawn = torch.randn(shape, generator=source, device=grad.device) / group["rank"] ** 0.5
        return drawn.to(grad.dtype)

    def update(self, seen: Projected, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        """The scaled gradient; the arguments are those of `SubspaceAdam.update`."""
        whole, low = seen.direction.norm(), seen.low.norm()
        factor = whole / (low + TINY) if self.per_tensor else channel_scale(seen.direction, seen.low)
        return limit_growth(group["scale"] ** 0.5 * factor * seen.grad, state)
