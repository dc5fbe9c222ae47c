"""Imports obey the arrows between rooms, as `docs/architecture.md` draws them."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "lit_reason"
PAGE = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
ROW = re.compile(r"^(\w+)/ +knows +([\w ]+?)(?:  +.*)?$", re.MULTILINE)
EXCEPTION = re.compile(r"^\* `([\w/]+\.py)` knows `(\w+)/`: \S", re.MULTILINE)

ARROWS = {room: set(known.split()) - {"nothing"} for room, known in ROW.findall(PAGE)}
EXCEPTIONS = set(EXCEPTION.findall(PAGE))


def sources() -> dict[str, Path]:
    """Every module by its path in the package; linked rooms are followed."""
    rooms = [item for item in PACKAGE.iterdir() if item.is_dir() and item.name not in ("recipes", "__pycache__")]
    return {
        f"{room.name}/{path.relative_to(room).as_posix()}": path
        for room in rooms
        for path in sorted(room.rglob("*.py"))
    }


def imported(code: str, module: str) -> set[str]:
    """The house's modules that some code imports, anywhere in it, as dotted names.

    Args:
        code: source.
        module: path of the module in the package, against which relative imports are read.
    """
    found: set[str] = set()
    here = ["lit_reason", *module.split("/")[:-1]]
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = here[: len(here) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            found |= {f"{base}.{alias.name}" for alias in node.names}
    return {name for name in found if name.partition(".")[0] == "lit_reason"}


def rooms_known(code: str, module: str) -> set[str]:
    """Other rooms that a module imports from. `errors` and the package itself stand below all rooms."""
    rooms = {name.split(".")[1] for name in imported(code, module) if "." in name}
    return {room for room in rooms if (PACKAGE / room).is_dir()} - {module.partition("/")[0]}


def test_the_page_draws_every_room():
    rooms = {name.partition("/")[0] for name in sources()}
    assert {"cli", "core", "kernels", "regimes"} <= rooms
    assert set(ARROWS) == rooms
    assert set().union(*ARROWS.values()) <= rooms


def test_the_arrows_make_no_circle():
    def below(room: str, path: tuple[str, ...]) -> None:
        assert room not in path, " -> ".join([*path, room])
        for other in ARROWS[room]:
            below(other, (*path, room))

    for room in ARROWS:
        below(room, ())


@pytest.mark.parametrize("room", sorted(ARROWS))
def test_no_import_goes_against_an_arrow(room):
    wrong = {
        (name, known)
        for name, path in sources().items()
        if name.startswith(f"{room}/")
        for known in rooms_known(path.read_text(encoding="utf-8"), name) - ARROWS[room]
    }
    assert wrong - EXCEPTIONS == set()


def test_every_exception_on_the_page_is_still_one():
    modules = sources()
    for name, known in EXCEPTIONS:
        assert known in rooms_known(modules[name].read_text(encoding="utf-8"), name) - ARROWS[name.partition("/")[0]]


def test_only_the_command_line_imports_its_parser():
    users = {
        name.partition("/")[0]
        for name, path in sources().items()
        if re.search(r"^\s*(from|import) (jsonargparse|argparse)\b", path.read_text(encoding="utf-8"), re.MULTILINE)
    }
    assert users == {"cli"}


def test_a_regime_knows_no_other_regime():
    for name, path in sources().items():
        if name.startswith("regimes/") and name.count("/") == 2:
            others = {n.split(".")[2] for n in imported(path.read_text(encoding="utf-8"), name) if "regimes." in n}
            assert others <= {name.split("/")[1]}, name


def test_imports_are_found_wherever_they_stand():
    code = (
        "def f():\n    from lit_reason.cli import door\n    import lit_reason.core.optim\nfrom ..data import loader\n"
    )
    assert imported(code + "import torch", "models/head.py") == {
        "lit_reason.cli.door",
        "lit_reason.core.optim",
        "lit_reason.data.loader",
    }
    assert rooms_known(code + "from lit_reason.errors import x", "models/head.py") == {"cli", "core", "data"}
