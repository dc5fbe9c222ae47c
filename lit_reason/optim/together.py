"""Several optimizers as one, each for its own parameters: matrices of hidden layers here, everything else there."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class Together(Optimizer):
    """Steps every part; groups and states are the parts' own, so schedules, resets and checkpoints see one optimizer.

    Args:
        *parts: optimizers over different parameters.
    """

    def __init__(self, *parts: Optimizer) -> None:
        self.parts = parts
        super().__init__([group for part in parts for group in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        """Make the parts work on this optimizer's groups and state."""
        groups = iter(self.param_groups)
        for part in self.parts:
            part.param_groups = [next(groups) for _ in part.param_groups]
            part.state = self.state

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step of every part.

        Args:
            closure: computes the loss and the gradients first, once.

        Returns:
            The closure's loss.
        """
        with torch.enable_grad():
            loss = closure() if closure is not None else None
        for part in self.parts:
            part.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a state; the parts go on with it.

        Args:
            state_dict: as `state_dict` gave it.
        """
        super().load_state_dict(state_dict)
        state: defaultdict[Tensor, Any] = self.state  # a new one, which the parts do not know yet
        self.state = state
        self._share()
