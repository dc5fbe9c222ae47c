"""Finding the packaged recipes and reading what their first comment block says."""

from __future__ import annotations

import re
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from lit_reason.errors import UserError

ROOT = Path(__file__).resolve().parent.parent / "recipes"
STUDIES = "studies"  # in this folder lie study files, which `lit-reason tournament` reads
FIELDS = ("hardware", "expected", "command")


@dataclass(frozen=True)
class Recipe:
    """One packaged recipe and its header.

    Args:
        name: path under the recipes folder without the suffix, such as `sft/smollm2-epic`.
        path: the file.
        purpose: first comment line: what it trains, on what.
        hardware: what it needs.
        expected: how long it takes there, and what comes out of it.
        command: the exact command.
    """

    name: str
    path: Path
    purpose: str = ""
    hardware: str = ""
    expected: str = ""
    command: str = ""

    @property
    def folder(self) -> str:
        """The group it is listed under."""
        return self.name.rpartition("/")[0]


def read_header(text: str) -> dict[str, str]:
    """The fields of a recipe's first comment block.

    The first line is the purpose. `# Hardware: ...`, `# Expected: ...` and `# Command: ...` follow; a line
    that starts none of them continues the field above it, up to an empty one. Editor lines are skipped.

    Args:
        text: the recipe.

    Returns:
        Field name to text; a field that is not there is absent.
    """
    found: dict[str, str] = {}
    field = "purpose"
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        body = line.lstrip("#").strip()
        if body.startswith(("yaml-language-server:", "!")):
            continue
        start = re.match(rf"({'|'.join(FIELDS)})\s*:\s*(.*)", body, re.IGNORECASE)
        if start:
            field = start[1].lower()
            found[field] = start[2]
        elif not body:
            field = ""
        elif field == "purpose" and "purpose" in found:
            field = ""
        elif field:
            found[field] = f"{found[field]} {body}".strip() if field in found else body
    return found


def find_recipes(root: Path = ROOT, *, studies: bool = False) -> list[Recipe]:
    """All recipes under a folder, in the order of their names.

    Args:
        root: the folder; default: the recipes that come with the package.
        studies: the study files instead.
    """
    recipes = []
    for path in sorted(root.rglob("*.yaml")):
        name = path.relative_to(root).with_suffix("").as_posix()
        if studies == name.startswith(f"{STUDIES}/"):
            recipes.append(Recipe(name, path, **read_header(path.read_text(encoding="utf-8"))))
    return recipes


def locate(given: str, root: Path = ROOT) -> Path:
    """The file behind a path or the name of a packaged recipe.

    A file that exists wins. Otherwise `sft/x`, `sft/x.yaml` and `recipes/sft/x.yaml` all name the packaged
    recipe, and so does `x` alone when no other recipe has that last part.

    Args:
        given: what the user wrote.
        root: folder of the packaged recipes.

    Raises:
        UserError: neither a file nor a recipe; names the nearest recipe.
    """
    if Path(given).is_file():
        return Path(given)
    if Path(given).is_dir():
        raise UserError(f"{given}: is a folder; a recipe is a .yaml file")
    paths = {path.relative_to(root).with_suffix("").as_posix(): path for path in sorted(root.rglob("*.yaml"))}
    name = given.removeprefix("./").removeprefix("recipes/").removesuffix(".yaml")
    if name in paths:
        return paths[name]
    tails = [key for key in paths if key.rpartition("/")[2] == name]
    if len(tails) == 1:
        return paths[tails[0]]
    if tails:
        raise UserError(f"{given!r} names several recipes: {', '.join(tails)}")
    raise UserError(f"no file and no packaged recipe is called {given!r}{_hint(name, paths)}; see `lit-reason list`")


def _hint(name: str, known: dict[str, Path]) -> str:
    """The nearest recipe by its whole name, or by its last part."""
    near = get_close_matches(name, known, n=1, cutoff=0.5)
    if not near:
        last = {key.rpartition("/")[2]: key for key in known}
        near = [last[key] for key in get_close_matches(name.rpartition("/")[2], last, n=1, cutoff=0.5)]
    return f" (did you mean '{near[0]}'?)" if near else ""


def header_problems(recipe: Recipe) -> list[str]:
    """What a recipe's header lacks, one line a problem; empty when it is complete."""
    lacks = [
        f"{recipe.name}: the header has no {field}" for field in ("purpose", *FIELDS) if not getattr(recipe, field)
    ]
    if recipe.purpose and not recipe.purpose.endswith("."):
        lacks.append(f"{recipe.name}: the first line is no whole sentence, and `lit-reason list` shows that line alone")
    return lacks


def lint_recipes(root: Path = ROOT) -> list[str]:
    """Check that each recipe has a full header and that its command parses and builds. Imports torch.

    The command of the header is run up to the point where training would start, on a CPU. A recipe whose
    command is not a trainer verb (`lit-reason demo`, `make demo`) is built as `fit --config RECIPE`.

    Args:
        root: folder of the recipes.

    Returns:
        One line a problem; empty when all is well.
    """
    import shlex

    from lit_reason.cli.reason_cli import VERBS, build

    problems: list[str] = []
    for recipe in find_recipes(root):
        problems += header_problems(recipe)
        words = shlex.split(recipe.command)
        verb, argv = "fit", ["--config", str(recipe.path)]
        if words[:1] == ["lit-reason"] and words[1:2] and words[1] in VERBS:
            verb, argv = words[1], words[2:]
            if not any(recipe.name in word for word in argv):
                problems.append(f"{recipe.name}: the command in its header does not name it")
        try:
            build(verb, [*argv, "--trainer.accelerator=cpu"])
        except UserError as error:
            problems.append(f"{recipe.name}: {error}")
    return problems + lint_studies(root)


def lint_studies(root: Path = ROOT) -> list[str]:
    """Check that each study file has a full header and that the options of all its arms are known.

    Args:
        root: folder of the recipes.

    Returns:
        One line a problem; empty when all is well.
    """
    from lit_reason.cli import tournament

    problems: list[str] = []
    for study in find_recipes(root, studies=True):
        problems += header_problems(study)
        try:
            tournament.check(tournament.load(study.path), Path("runs"))
        except UserError as error:
            problems.append(f"{study.name}: {error}")
    return problems
