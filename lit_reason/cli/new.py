"""`lit-reason new regime NAME`: the files of a new training method, complete enough to train at once.

In a checkout of lit_reason they go where its own regimes are. Anywhere else they make a package of your own.
"""

from __future__ import annotations

import importlib.util
import keyword
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lit_reason.cli.command_parser import CommandParser
from lit_reason.errors import UserError, did_you_mean

SKELETON = Path(__file__).resolve().parent / "skeleton"
MODULES = ("__init__.py", "config.py", "loss.py", "regime.py")
KINDS = ("regime",)
# Arguments of every regime, and blocks of every recipe; the method's own settings stand beside them.
TAKEN = {"lm", "optim", "sampling", "model", "data", "trainer", "vars", "self", "torch", "batch", "regime", "regimes"}


@dataclass(frozen=True)
class NewRegime:
    """Names and places of a regime to be written.

    Args:
        name: of folder, recipe and settings, such as `turn_credit`.
        title: as prose has it, such as `Turn credit`.
        into: the project folder.
    """

    name: str
    title: str
    into: Path

    @property
    def in_house(self) -> bool:
        """Whether the project is a checkout of lit_reason."""
        return (self.into / "lit_reason/regimes").is_dir()

    @property
    def package(self) -> str:
        """Import path of its folder."""
        return f"lit_reason.regimes.{self.name}" if self.in_house else self.name

    @property
    def prefix(self) -> str:
        """What its class names begin with: the title's words joined."""
        return "".join(word[:1].upper() + word[1:] for word in re.findall(r"[A-Za-z0-9]+", self.title))

    @property
    def folder(self) -> Path:
        """Where its modules go."""
        return self.into / self.package.replace(".", "/")

    @property
    def recipe(self) -> Path:
        """Its tiny recipe."""
        return self.into / f"recipes/smoke/{self.name}.yaml"

    @property
    def page(self) -> Path:
        """Its page of documentation."""
        return self.into / f"docs/regimes/{self.name}.md"

    def files(self) -> dict[Path, str]:
        """The text of every file, by path."""
        import jinja2

        loader = jinja2.FileSystemLoader(SKELETON)
        environment = jinja2.Environment(loader=loader, undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
        words = {
            "name": self.name,
            "title": self.title,
            "prefix": self.prefix,
            "package": self.package,
            "in_house": self.in_house,
            "class_path": f"{self.prefix}Regime" if self.in_house else f"{self.package}.regime.{self.prefix}Regime",
            "recipe": f"smoke/{self.name}" if self.in_house else f"recipes/smoke/{self.name}.yaml",
        }
        wanted = {self.folder / module: f"{module}.jinja" for module in MODULES}
        wanted |= {self.recipe: "recipe.yaml.jinja", self.page: "page.md.jinja"}
        return {path: environment.get_template(template).render(words) for path, template in wanted.items()}

    def check(self) -> None:
        """Refuse names that do not work and places that are taken.

        Raises:
            UserError: says which, and what would be allowed.
        """
        if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", self.name):
            low = re.sub(r"[^a-z0-9]+", "_", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", self.name).lower()).strip("_")
            near = f" (did you mean '{low}'?)" if re.match("[a-z]", low) else ""
            raise UserError(
                f"new regime: {self.name!r} is no name for a folder of Python code: lower-case words "
                f"joined by _, the first character a letter{near}"
            )
        if keyword.iskeyword(self.name) or self.name in TAKEN:
            raise UserError(f"new regime: {self.name!r} has a meaning already, in Python or in recipes; add a word")
        if not re.match("[A-Za-z]", self.prefix):
            raise UserError(f"new regime: --title {self.title!r} must begin with a letter: class names come from it")
        if not self.into.is_dir():
            raise UserError(f"new regime: --into {self.into} is no folder")
        for path in (self.folder, self.recipe, self.page):
            if path.exists():
                raise UserError(f"new regime: {path} exists already; nothing was written")
        if not self.in_house and importlib.util.find_spec(self.name) is not None:
            raise UserError(f"new regime: a folder {self.name!r} would hide the installed package of that name")
        if self.in_house:
            for module in sorted((self.into / "lit_reason/regimes").rglob("*.py")):
                if f"class {self.prefix}Regime(" in module.read_text(encoding="utf-8"):
                    raise UserError(f"new regime: {module} has a {self.prefix}Regime already; give another --title")


def build_parser() -> CommandParser:
    """The command's parser."""
    parser = CommandParser(
        "new",
        "Write the files of a new training method: a regime that trains at once, a recipe of seconds, "
        "and a page. In a checkout of lit_reason they go where its own regimes are, elsewhere into a package NAME.",
    )
    parser.add_argument("kind", metavar="regime", help="what to write")
    parser.add_argument("name", metavar="NAME", help="its name: lower-case words joined by _, such as turn_credit")
    parser.add_argument("--into", type=Path, default=Path(), metavar="DIR", help="project folder (default: this one)")
    parser.add_argument("--title", help="its name in prose and in class names, such as MT-GRPO (default: from NAME)")
    return parser


def main(argv: Sequence[str]) -> int:
    """`new regime NAME [--into DIR] [--title TITLE]`.

    Args:
        argv: arguments after the verb.

    Raises:
        UserError: the name does not work, or something lies where a file would go.
    """
    given = build_parser().parse_args(argv)
    if given.kind not in KINDS:
        raise UserError(
            f"new: cannot write a {given.kind!r}{did_you_mean(given.kind, KINDS)}; only: {', '.join(KINDS)}"
        )
    title = given.title if given.title is not None else given.name.replace("_", " ").capitalize()
    regime = NewRegime(given.name, title, given.into)
    regime.check()
    for path, text in regime.files().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        print(path)
    print(next_steps(regime))
    return 0


def next_steps(regime: NewRegime) -> str:
    """What to do with the files, in order.

    Args:
        regime: what was written.
    """
    recipe = f"smoke/{regime.name}" if regime.in_house else f"recipes/smoke/{regime.name}.yaml"
    there = "" if regime.into == Path() else f"   (in {regime.into})"
    steps = [
        "lit-reason demo --quick" + there + "    once: data and student of the tiny recipe",
        f"lit-reason fit --config {recipe}    it trains; now write {regime.folder / 'loss.py'}",
    ]
    if regime.in_house:
        steps += [
            "pytest tests/conformance --write-golden    the promises of every regime; records the first losses",
            "a row in docs/papers.md, and the page in mkdocs.yml",
        ]
    return "\n".join(["", "Next:", *(f"  {step}" for step in steps)])
