"""Forgetting what an optimizer has accumulated, in place: groups, schedules and hooks stay as they are."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lit_reason.core.ranks import from_all_ranks
from lit_reason.errors import UserError

Reset = Literal["all", "moments", "first", "none"]

# By the names optimizers give their state: torch's Adam family and Muon, and bitsandbytes, whose 8-bit codes mean
# nothing without their block scales: codes of zero under an old scale are minus its maximum.
FIRST = ("exp_avg", "momentum_buffer", "state1", "absmax1")
SECOND = ("exp_avg_sq", "max_exp_avg_sq", "state2", "absmax2")
COUNT = ("step",)
CONSTANT = ("qmap1", "qmap2")
FORGOTTEN: dict[str, tuple[str, ...]] = {
    "all": FIRST + SECOND + COUNT,
    "moments": FIRST + SECOND,
    "first": FIRST,
    "none": (),
}


def check_state(optimizer: Optimizer) -> None:
    """Make sure that `reset_momentum` knows all that this optimizer keeps. Call it after a step has been made.

    Args:
        optimizer: any.

    Raises:
        UserError: it keeps something under another name.
    """
    known = {*FIRST, *SECOND, *COUNT, *CONSTANT}
    for state in optimizer.state.values():
        for name in sorted(state.keys() - known):
            raise UserError(
                f"Restart: {type(optimizer).__name__} keeps '{name}', and it is not known what a reset makes of it; "
                "set reset: none, or use adamw, adamw8bit or Muon"
            )


@torch.no_grad()
def reset_momentum(optimizer: Optimizer, what: Reset) -> None:
    """Zero an optimizer's state.

    `all` gives, bit for bit, the steps of a freshly built optimizer. `moments` keeps the step counter, so that the next
    updates are up to 3.2 times as large (betas 0.9 and 0.999): the learning rate has to come back slowly. `first` keeps
    the second moment: the next update is a tenth as large and grows.

    Args:
        optimizer: torch's Adam, AdamW or Muon, or one of bitsandbytes in 8 or 32 bits.
        what: `all` (both moments and the step counter), `moments`, `first` (moment), or `none`.
    """
    for state in optimizer.state.values():
        for name in FORGOTTEN[what]:
            value = state.get(name)
            if isinstance(value, Tensor):
                value.zero_()
            elif value is not None:
                state[name] = 0


@torch.no_grad()
def effective_lr(optimizer: Optimizer) -> float | None:
    """The size of the step that Adam is making: learning rate times the root mean square of its direction.

    It equals the learning rate after a reset of everything, where every direction is +1 or -1, and is smaller the more
    the gradients of the last steps disagree.

    Args:
        optimizer: one of torch's Adam family; all processes call this together.

    Returns:
        The figure, or None for optimizers of another kind.
    """
    squares, count = 0.0, 0
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            if not {"exp_avg", "exp_avg_sq", "step"} <= state.keys() or "betas" not in group:
                return None
            direction = _direction(state, group)
            squares += float(group["lr"]) ** 2 * float(direction.square_().sum(dtype=torch.float64))
            count += direction.numel()
    parts = from_all_ranks((squares, count))  # equal parts where nothing is sharded
    squares, count = (sum(part) for part in zip(*parts, strict=True))
    return (squares / count) ** 0.5 if count else None


def _direction(state: dict[str, Any], group: dict[str, Any]) -> Tensor:
    """Adam's update over the learning rate, of this process's part of a parameter, in float32."""
    first, second = (_local(state[name]).float() for name in ("exp_avg", "exp_avg_sq"))
    first_share, second_share = (1 - beta ** float(state["step"]) for beta in group["betas"])
    return (first / first_share).div_((second / second_share).sqrt_().add_(group["eps"]))


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
