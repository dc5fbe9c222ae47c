"""Optimizer state by parameter name, as sharded checkpoints have it, and by number, as an optimizer has it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def number_parameters(state: dict[str, Any]) -> dict[str, Any]:
    """Turn parameter names into positions in the optimizer's groups, which is how `Optimizer.state_dict` numbers.

    Args:
        state: `{"state": {name: ...}, "param_groups": [{"params": [name, ...], ...}, ...]}`.

    Returns:
        The same with numbers; the argument is unchanged.
    """
    names = [name for group in state["param_groups"] for name in group["params"]]
    return _renamed(state, {name: number for number, name in enumerate(names)})


def name_parameters(state: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The reverse of `number_parameters`.

    Args:
        state: numbered.
        names: of the optimizer's parameters, in the order of its groups.
    """
    return _renamed(state, dict(enumerate(names)))


def _renamed(state: dict[str, Any], new: dict[Any, Any]) -> dict[str, Any]:
    groups = [{**group, "params": [new[p] for p in group["params"]]} for group in state["param_groups"]]
    return {**state, "state": {new[p]: values for p, values in state["state"].items()}, "param_groups": groups}
