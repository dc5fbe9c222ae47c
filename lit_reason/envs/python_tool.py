"""The tool that runs a model's Python in the sandbox, one pool of processes for all rollouts."""

from __future__ import annotations

import atexit
import functools
from collections.abc import Callable

from lit_reason.envs.sandbox.jail import Sandbox


def python_tool(as_root: bool = False) -> Callable[[str], str]:
    """A function that a model may call with a program.

    Args:
        as_root: run although this process is root (see `Sandbox`).

    Raises:
        UserError: this process is root, and nobody said that this is meant.
    """
    sandbox = _pool(as_root)

    def python(source: str) -> str:
        """Run a Python program and return what it prints.

        Args:
            source: the program; it may import math and other pure modules of the standard library.
        """
        return sandbox.run(source).text()

    return python


@functools.cache
def _pool(as_root: bool) -> Sandbox:
    sandbox = Sandbox(workers=2, as_root=as_root)
    atexit.register(sandbox.close)
    return sandbox
