"""The packaging decision: real top-level rooms, linked into the package, all of them in the wheel."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("kernels", "callbacks", "recipes")


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_are_links_without_an_init_file(room):
    link = ROOT / "lit_reason" / room
    assert link.is_symlink() and link.resolve() == ROOT / room
    # With one, `kernels` would shadow the kernel hub's package of that name and break transformers.
    assert not (ROOT / room / "__init__.py").exists()


def test_the_wheel_holds_every_room(tmp_path):
    tree = tmp_path / "tree"
    leave_out = shutil.ignore_patterns(".*", "runs", "site", "build", "dist", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, tree, symlinks=True, ignore=leave_out)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(tree)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    names = set(zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist())
    for room, pattern in [("kernels", "*.py"), ("callbacks", "*.py"), ("recipes", "**/*.yaml")]:
        wanted = {f"lit_reason/{room}/{p.relative_to(ROOT / room)}" for p in (ROOT / room).glob(pattern)}
        assert wanted and wanted <= names, sorted(wanted - names)
    templates = {str(p.relative_to(ROOT)) for p in (ROOT / "lit_reason").rglob("*.jinja")}
    assert templates <= names
    assert not [n for n in names if not n.startswith(("lit_reason/", "lit_reason-"))]


def test_rooms_import_without_optional_packages():
    """regimes, data, kernels and callbacks must load where bitsandbytes, datasets and jsonargparse are missing."""
    code = """
import sys, pkgutil, importlib
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"bitsandbytes", "datasets", "math_verify", "gguf", "triton"}:
            raise ModuleNotFoundError(name)
        if name.split(".")[0] == "jsonargparse" and not any("lightning" in str(f) for f in self.callers()):
            raise ModuleNotFoundError(name)
    def callers(self):
        frame = sys._getframe(2)
        while frame:
            yield frame.f_code.co_filename
            frame = frame.f_back
sys.meta_path.insert(0, Block())
from lit_reason.errors import UserError
import lit_reason.data, lit_reason.models, lit_reason.regimes, lit_reason.rollout, lit_reason.rewards, lit_reason.core
for room in ("data", "models", "regimes", "rollout", "rewards", "core", "callbacks", "kernels"):
    path = [f"lit_reason/{room}"]
    for found in pkgutil.walk_packages(path, f"lit_reason.{room}."):
        try:
            importlib.import_module(found.name)
        except UserError as error:  # the module of an optional part itself: it must say which extra installs it
            assert "pip install 'lit-reason[" in str(error), found.name
print("ok")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip().endswith("ok"), done.stderr[-3000:]
