"""Functions that a recipe names: one of a table, or `package.module:function` of the user's own."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterable
from typing import Any

from lit_reason.errors import UserError, did_you_mean


def load_function(spec: str, what: str, builtin: Iterable[str] = ()) -> Callable[..., Any]:
    """The function behind `package.module:function`; modules in the current folder are found, too.

    Args:
        spec: as the user wrote it.
        what: the setting, for messages.
        builtin: names that would have been accepted instead.

    Raises:
        UserError: there is no such module, or no such function in it.
    """
    module_name, colon, function_name = spec.partition(":")
    if not colon:
        allowed = ", ".join(builtin)
        raise UserError(
            f"{what} is '{spec}'; it must be one of {allowed}, or package.module:function{did_you_mean(spec, builtin)}"
        )
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not (module_name + ".").startswith(error.name + "."):
            raise  # the module is there, and something that it imports is not
        near = did_you_mean(module_name, builtin)
        raise UserError(
            f"{what} is '{spec}': there is no module '{error.name}' on the Python path or in {os.getcwd()}{near}"
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        near = did_you_mean(function_name, (n for n in dir(module) if callable(getattr(module, n))))
        raise UserError(f"{what} is '{spec}': module '{module_name}' has no function '{function_name}'{near}")
    return function
