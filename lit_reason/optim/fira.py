"""Fira: GaLore plus the part of the gradient outside the subspace, scaled as Adam scales the inside.

Chen et al., arXiv 2410.01623.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lit_reason.optim.galore import GaLore
from lit_reason.optim.subspace import Projected, back, channel_scale, limit_growth


class Fira(GaLore):
    """Update = `scale * P^T psi(R) + E`, where `E = phi (G - P^T R)`, `phi_j = |psi(R)_j| / |R_j|`, R = P G.

    The norm of E may grow by 1 % a step.

    Args:
        params: matrices.
        paper_exact: subtract `P^T R` as the paper does. The released code subtracts `scale * P^T R`, so that
            `1 - scale` of the gradient inside the subspace stays in E; published figures come from that.
        **settings: as in `SubspaceAdam`.
    """

    def __init__(self, params: Any, *, paper_exact: bool = False, **settings: Any) -> None:
        super().__init__(params, **settings)
        self.paper_exact = paper_exact

    def update(self, seen: Projected, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        """Inside and outside of the subspace together; the arguments are those of `SubspaceAdam.update`."""
        inside = back(seen.low, seen.basis) * (1.0 if self.paper_exact else group["scale"])
        outside = limit_growth((seen.grad - inside) * channel_scale(seen.direction, seen.low), state)
        return super().update(seen, state, group) + outside
