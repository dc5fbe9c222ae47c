"""Optimizers that see each gradient through a low-rank subspace: what GaLore, Fira and APOLLO share.

Shapes: G a gradient [M, N], R rank. The subspace lies along the shorter side, so the projected gradient is [M, R]
(M >= N) or [R, N].
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from lit_reason.errors import UserError
from lit_reason.optim.adam import adam_direction

GROWTH = 1.01  # most that the part outside the subspace may grow from one step to the next (Fira's limiter)
TINY = 1e-8


class Projected(NamedTuple):
    """A gradient in its subspace.

    Attributes:
        grad: the gradient, [M, N].
        low: projected, [M, R] or [R, N].
        direction: Adam's direction for `low`, uncorrected.
        basis: the subspace, as rows, [R, shorter side].
    """

    grad: Tensor
    low: Tensor
    direction: Tensor
    basis: Tensor


class SubspaceAdam(Optimizer):
    """Adam's moments on projected gradients; a subclass says which subspace, and what becomes of the gradient.

    Args:
        params: matrices.
        lr: learning rate.
        betas: decay of the two moments.
        eps: added to the denominator.
        weight_decay: decoupled decay.
        rank: R.
        refresh_steps: steps between changes of the subspace. The moments stay as they are then.
        scale: factor on the update.

    Raises:
        UserError: the rank does not fit a matrix, or the period is below 1.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        rank: int = 128,
        refresh_steps: int = 200,
        scale: float = 1.0,
    ) -> None:
        own = {"rank": rank, "refresh_steps": refresh_steps, "scale": scale}
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, **own})
        if refresh_steps < 1:
            raise UserError(f"optim.subspace.refresh_steps is {refresh_steps}: it must be at least 1")
        for p in (p for group in self.param_groups for p in group["params"]):
            if p.ndim != 2 or not 1 <= rank <= min(p.shape):
                raise UserError(
                    f"optim.subspace.rank is {rank}, but a trained matrix is {' x '.join(map(str, p.shape))}: "
                    f"the rank must be at least 1 and at most {min(p.shape)}"
                )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One optimizer step.

        Args:
            closure: computes the loss and the gradients first.

        Returns:
            The closure's loss.
        """
        with torch.enable_grad():
            loss = closure() if closure is not None else None
        for group in self.param_groups:
            for number, p in enumerate(group["params"]):
                if p.grad is not None:
                    state = self.state[p]
                    basis = self.basis(p.grad, int(state.get("step", 0)), number, state, group)
                    low = project(p.grad, basis)
                    direction, correction = adam_direction(low, state, group["betas"], group["eps"])
                    update = self.update(Projected(p.grad, low, direction, basis), state, group)
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(update, alpha=-group["lr"] * correction)
        return loss

    def basis(self, grad: Tensor, step: int, number: int, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        """The subspace of this step, as rows.

        Args:
            grad: [M, N].
            step: steps made so far.
            number: of the matrix in its group.
            state: of the matrix.
            group: settings.

        Returns:
            [R, shorter side].
        """
        raise NotImplementedError

    def update(self, seen: Projected, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        """What to subtract from the matrix for lr 1, before bias correction.

        Args:
            seen: the gradient in its subspace.
            state: of the matrix.
            group: settings.

        Returns:
            [M, N].
        """
        raise NotImplementedError


def project(grad: Tensor, basis: Tensor) -> Tensor:
    """[M, N] to [M, R] where M >= N, else to [R, N]."""
    return grad @ basis.mT if grad.shape[0] >= grad.shape[1] else basis @ grad


def back(low: Tensor, basis: Tensor) -> Tensor:
    """The reverse of `project` for a basis of orthonormal rows, with the part outside the subspace lost."""
    return low @ basis if low.shape[0] >= low.shape[1] else basis.mT @ low


def leading_basis(grad: Tensor, rank: int) -> Tensor:
    """The singular vectors of the shorter side that belong to the largest singular values, in float32.

    Args:
        grad: [M, N].
        rank: R.

    Returns:
        Orthonormal rows, [R, shorter side], in the gradient's dtype.
    """
    u, _, vh = torch.linalg.svd(grad.float(), full_matrices=False)
    rows = vh[:rank] if grad.shape[0] >= grad.shape[1] else u[:, :rank].mT
    return rows.to(grad.dtype).contiguous()


def channel_scale(direction: Tensor, low: Tensor) -> Tensor:
    """How much Adam scaled each channel: `|psi(R)_j| / |R_j|`, a channel being a row or column of the longer side.

    Args:
        direction: Adam's direction, [M, R] or [R, N].
        low: the projected gradient, of the same shape.

    Returns:
        [M, 1] or [1, N].
    """
    across = 1 if low.shape[0] >= low.shape[1] else 0
    return direction.norm(dim=across, keepdim=True) / (low.norm(dim=across, keepdim=True) + TINY)


def limit_growth(update: Tensor, state: dict[str, Any]) -> Tensor:
    """Scale an update down whose norm grew by more than `GROWTH` since the step before.

    Args:
        update: of any shape.
        state: holds the norm of the step before as `update_norm`.
    """
    norm = update.norm()
    if "update_norm" in state:
        shrink = (norm / (state["update_norm"] + TINY)).clamp(min=GROWTH) / GROWTH
        update, norm = update / shrink, norm / shrink
    state["update_norm"] = norm
    return update
