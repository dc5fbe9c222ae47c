"""The Triton kernels compile for GPUs that are not here, and what comes out is what the design needs.

The limits hold for every release of Triton; the golden table, made by `census.py --write`, for the releases in it.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import pytest
from census import GOLDEN, VARIANTS

WARPS = 8
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
NAMES = {variant.name(arch): (variant, arch) for variant in VARIANTS for arch in variant.archs}


def why_not() -> str | None:
    """What is missing for compiling, or None."""
    spec = find_spec("triton")
    if spec is None or spec.origin is None:
        return "triton is not installed"
    tool = Path(spec.origin).parent / "backends/nvidia/bin/cuobjdump"
    if not shutil.which(tool):
        return f"this build of triton ({platform.machine()}) has no cuobjdump"
    return None


pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))


@pytest.fixture(scope="module")
def census(tmp_path_factory):
    """Everything compiled once, in a process of its own and with an empty cache."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    script = Path(__file__).with_name("census.py")
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)["kernels"]


@pytest.mark.parametrize("name", NAMES)
def test_limits(name, census):
    variant, arch = NAMES[name]
    row = census[name]
    assert row["spills"] == row["stack"] == row["local"] == 0
    assert row["registers"] * 32 * WARPS <= 65536
    assert row["shared"] <= SHARED_LIMIT[arch]
    assert row["tensor_core"] == 0  # products are cuBLAS's
    assert row["loops"] and row["barriers_in_loops"] == 0  # threads meet at the end of a row, not before
    # A thread holds two lanes of a row, or one of each row of a pair, whose statistics read the rows twice. In the last
    # block of a row that is not a multiple of 16, loads must be narrow.
    tail = 2 if variant.aligned else 0
    assert row["loads_128"] >= (4 if variant.kernel == "divergence_kernel" else 2) + tail
    stores = 0 if "grad" not in variant.kernel else 1 if variant.kind else 2
    assert row["stores_128"] == (2 * stores if variant.aligned else stores)


def test_registers_and_memory_are_those_of_the_golden_table(census):
    golden = json.loads(GOLDEN.read_text()).get(metadata.version("triton"))
    if golden is None:
        pytest.skip(f"no golden table for triton {metadata.version('triton')}: python tests/aot/census.py --write")
    assert census.keys() == golden.keys()
    for name, row in census.items():
        want = golden[name]
        assert abs(row["registers"] - want["registers"]) <= 8, (name, row, want)
        assert row["shared"] <= want["shared"], (name, row, want)
        assert row["loads_128"] == want["loads_128"] and row["stores_128"] == want["stores_128"], (name, row, want)
        assert row["instructions"] <= 1.1 * want["instructions"], (name, row, want)


def test_the_golden_table_holds_every_variant_for_two_releases():
    """The release of the development set, and one that a GPU machine may have."""
    golden = json.loads(GOLDEN.read_text())
    assert {"3.6.0", "3.9.0"} <= golden.keys()
    for table in golden.values():
        assert table.keys() == NAMES.keys()
