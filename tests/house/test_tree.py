"""The annotated tree of docs/architecture.md is the tree."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def documented() -> set[str]:
    """Paths of folders and modules, from the indentation of the page's tree."""
    page = (ROOT / "docs" / "architecture.md").read_text()
    tree = page.split("## The annotated tree")[1].split("```")[1].strip("\n")
    paths, above = set(), []
    for line in tree.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        name = line.split()[0]
        above[depth:] = [name.rstrip("/")]
        paths.add("/".join(above) + ("/" if name.endswith("/") else ".py"))
    return paths


def test_every_module_stands_in_the_documented_tree():
    found = set()
    for top in ("lit_reason", "kernels", "callbacks"):
        for path in (ROOT / top).rglob("*.py"):
            inside = path.relative_to(ROOT)
            linked = any((ROOT / parent).is_symlink() for parent in inside.parents)
            if path.name != "__init__.py" and not linked:
                found.add(str(inside))
    listed = {p for p in documented() if p.endswith(".py")}
    assert sorted(found - listed) == [], "not in docs/architecture.md"
    assert sorted(listed - found) == [], "only in docs/architecture.md"


def test_test_files_have_names_of_their_own():
    """Two files of one name cannot be collected in one run; nobody notices who runs one folder at a time."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted({name for name in names if names.count(name) > 1}) == []
