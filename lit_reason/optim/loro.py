"""LORO: factors of `W = M N^T` that move along the manifold of rank-R matrices (Mo, Huang, Pan, ICLR 2025).

Shapes: M outputs, N inputs, R rank; M_ and N_ in the text are the factors, [M, R] and [N, R].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lit_reason.errors import UserError
from lit_reason.kernels.refactorization import balanced_split
from lit_reason.optim.adam import adam_direction


class Loro(Optimizer):
    """Adam on the factors with the rate times R / min(M, N), and every `exact_steps` steps an exact Riemannian one.

    After an exact step all moments and step counters begin anew, also those of the other parameters. Give the schedule
    the same period (`optim.period_steps`), so that the rate comes back slowly.

    Args:
        groups: parameter groups. One with `scales` holds pairs, B then A, of layers `W = scale * B A^T`, and the scale
            of each pair; any other gets plain AdamW.
        lr: learning rate.
        betas: decay of the two moments.
        eps: added to the denominator.
        weight_decay: decoupled decay, where a group has no other; factors are not decayed.
        exact_steps: steps between exact steps.

    Raises:
        UserError: the period is below 1.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        exact_steps: int = 500,
    ) -> None:
        settings = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "exact_steps": exact_steps}
        super().__init__(groups, {**settings, "scales": None})
        if exact_steps < 1:
            raise UserError(f"optim.subspace.refresh_steps is {exact_steps}: it must be at least 1")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One optimizer step.

        Args:
            closure: computes the loss and the gradients first.

        Returns:
            The closure's loss.

        Raises:
            UserError: a factor of an exact step has not full rank.
        """
        with torch.enable_grad():
            loss = closure() if closure is not None else None
        exact = False
        for group in self.param_groups:
            updates = {p: self._direction(p, group) for p in group["params"] if p.grad is not None}
            exact = exact or any(int(self.state[p]["step"]) % group["exact_steps"] == 0 for p in updates)
            if group["scales"] is None:
                for p, update in updates.items():
                    p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=group["lr"])
                continue
            pairs = zip(group["params"][::2], group["params"][1::2], group["scales"], strict=True)
            for out_factor, in_factor, scale in pairs:
                if out_factor in updates and in_factor in updates:
                    move = _exact_step if exact else _lazy_step
                    move(out_factor, in_factor, updates[out_factor], updates[in_factor], scale, group["lr"])
        if exact:
            for state in self.state.values():
                for value in state.values():
                    value.zero_()
        return loss

    def _direction(self, p: Tensor, group: dict[str, Any]) -> Tensor:
        assert p.grad is not None
        direction, correction = adam_direction(p.grad, self.state[p], group["betas"], group["eps"])
        return direction.mul_(correction)


def _lazy_step(b: Tensor, a: Tensor, b_update: Tensor, a_update: Tensor, scale: float, lr: float) -> None:
    """Adam on the factors `sqrt(scale) B` and `sqrt(scale) A` of W; Adam's direction does not depend on their scale."""
    small = lr * b.shape[1] / min(len(b), len(a)) / scale**0.5
    b.sub_(b_update, alpha=small)
    a.sub_(a_update, alpha=small)


def _exact_step(b: Tensor, a: Tensor, b_update: Tensor, a_update: Tensor, scale: float, lr: float) -> None:
    root = scale**0.5
    new_b, new_a = exact_step(b * root, a * root, b_update, a_update, lr)
    b.copy_(new_b / root)
    a.copy_(new_a / root)


def exact_step(m: Tensor, n: Tensor, d_m: Tensor, d_n: Tensor, lr: float) -> tuple[Tensor, Tensor]:
    """Go along the tangent of the manifold at `W = M_ N_^T`, and back onto it by the best rank-R approximation.

    With lr 0 this is the balanced refactorization of `M_ N_^T`.

    Args:
        m: M_, [M, R].
        n: N_, [N, R].
        d_m: its direction, [M, R]; the gradient of M_ gives the steepest descent of W.
        d_n: that of N_, [N, R].
        lr: step length.

    Returns:
        New M_ and N_, balanced, computed in float32 or wider.

    Raises:
        UserError: M_ or N_ has not full rank.
    """
    wide = torch.promote_types(m.dtype, torch.float32)
    u, r_m = torch.linalg.qr(m.to(wide))
    v, r_n = torch.linalg.qr(n.to(wide))
    x = torch.linalg.solve_triangular(r_n, d_m.to(wide), upper=True, left=False)  # d_m r_n^-1
    y = torch.linalg.solve_triangular(r_m.mT, d_n.to(wide).mT, upper=False)  # r_m^-T d_n^T
    if not (x.isfinite().all() and y.isfinite().all()):
        raise UserError("loro: a factor has not full rank, as a zero one has not: set lm.lowrank.init to kaiming")
    k_0 = y @ v
    q_1, k_1 = torch.linalg.qr((y - k_0 @ v.mT).mT)
    q_2, k_2 = torch.linalg.qr(x - u @ (u.mT @ x))
    top = torch.cat([r_m @ r_n.mT - lr * k_0, -lr * k_1.mT], dim=1)
    bottom = torch.cat([-lr * k_2, torch.zeros_like(k_2)], dim=1)
    left, right = balanced_split(torch.cat([top, bottom]), rank=m.shape[1])
    return (torch.cat([u, q_2], dim=1) @ left).to(m.dtype), (torch.cat([v, q_1], dim=1) @ right).to(n.dtype)
