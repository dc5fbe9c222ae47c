"""Runs the tests of the Triton kernels in a process where Triton interprets kernels instead of compiling them.

Triton decides that when a kernel is defined, for the whole process: everything else is tested without it.
"""

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "interpreted"


def why_not() -> str | None:
    """Why Triton cannot interpret here, or None: before 3.9, with numpy 2.4, loops with a bound from outside fail."""
    try:
        version = metadata.version("triton")
    except metadata.PackageNotFoundError:
        return "triton is not installed"
    new = tuple(int(part) for part in version.split(".")[:2]) >= (3, 9)
    return None if new else f"the interpreter of triton {version} cannot run the kernels' loops"


@pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
@pytest.mark.parametrize("which", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_triton_kernels_under_the_interpreter(which):
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", str(FOLDER), "-m", which, "-p", "no:cacheprovider"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=FOLDER.parents[2])
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
