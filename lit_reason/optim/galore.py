"""GaLore: Adam in the subspace of the gradient's leading singular vectors (Zhao et al., arXiv 2403.03507)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lit_reason.optim.subspace import Projected, SubspaceAdam, back, leading_basis


class GaLore(SubspaceAdam):
    """Update = `scale * P^T psi(P G)`, with P from the gradient every `refresh_steps` steps and psi Adam's direction.

    Arguments are those of `SubspaceAdam`. The projector is a plain tensor of the state, `basis`.
    """

    def basis(self, grad: Tensor, step: int, number: int, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        """As of the last refresh; the arguments are those of `SubspaceAdam.basis`."""
        if "basis" not in state or step % group["refresh_steps"] == 0:
            state["basis"] = leading_basis(grad, group["rank"])
        return state["basis"]

    def update(self, seen: Projected, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        """Adam's direction, projected back; the arguments are those of `SubspaceAdam.update`."""
        return group["scale"] * back(seen.direction, seen.basis)
