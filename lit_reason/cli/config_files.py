"""Reading config files with their line numbers, before anything heavy is imported.

The parser that follows takes the last of two equal keys without a word and reports no lines; both are mended
here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from lit_reason.cli.recipes import locate
from lit_reason.errors import UserError, did_you_mean

CONFIG_OPTIONS = ("--config", "-c")
VARIABLE = re.compile(r"\$\{\s*vars\.([\w.\-]+)\s*\}")


@dataclass(frozen=True)
class Source:
    """Settings from one place.

    Args:
        name: the file, or `command line`.
        root: its settings as a YAML node, which knows the lines.
        is_file: False for a command-line option.
    """

    name: str
    root: yaml.MappingNode
    is_file: bool

    def where(self, node: yaml.Node) -> str:
        """`file:line` of a node, or the words `command line`."""
        return f"{self.name}:{node.start_mark.line + 1}" if self.is_file else self.name


def resolve_names(argv: Sequence[str]) -> list[str]:
    """The arguments with packaged recipe names after `--config` replaced by their paths.

    Args:
        argv: arguments after the verb.

    Raises:
        UserError: the name is neither a file nor a recipe.
    """
    out: list[str] = []
    follows = False
    for token in argv:
        name, sign, value = token.partition("=")
        if follows:
            out.append(str(locate(token)))
        elif name in CONFIG_OPTIONS and sign:
            out += [name, str(locate(value))]
        else:
            out.append(token)
        follows = not follows and token in CONFIG_OPTIONS
    return out


def split_options(argv: Sequence[str]) -> list[tuple[str, str | None]]:
    """Pairs of option and value in the order given; a flag has the value None, a stray word the option ''."""
    pairs: list[tuple[str, str | None]] = []
    tokens = list(argv)
    while tokens:
        token = tokens.pop(0)
        if not token.startswith("-") or re.fullmatch(r"-[\d.].*", token):
            pairs.append(("", token))
            continue
        name, sign, value = token.partition("=")
        if sign:
            pairs.append((name, value))
        elif tokens and (not tokens[0].startswith("-") or re.fullmatch(r"-[\d.].*", tokens[0])):
            pairs.append((name, tokens.pop(0)))
        else:
            pairs.append((name, None))
    return pairs


def read_config(path: str | Path) -> Source:
    """Read one config file and refuse what YAML itself would let through.

    Args:
        path: the file.

    Raises:
        UserError: missing, unreadable, not UTF-8, not YAML, empty, not a mapping, or a key given twice.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such config file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise UserError(_syntax_message(path, text, error)) from None
    if root is None:
        raise UserError(f"{path}: the file holds no settings")
    if not isinstance(root, yaml.MappingNode):
        raise UserError(f"{path}: a config is a mapping of keys such as `trainer:`, `model:`, `data:`")
    _refuse_duplicates(path, root)
    return Source(str(path), root, is_file=True)


def _syntax_message(path: Path, text: str, error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    line = mark.line + 1 if mark else 1
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    message = f"{path}:{line}: not valid YAML: {problem}"
    lines = text.splitlines()
    shown = lines[line - 1] if line <= len(lines) else ""
    if "${" in shown and ("{" in shown.replace("${", "") or "[" in shown):
        message += '; inside {...} or [...] put quotes around an interpolation: "${vars.x}"'
    elif "\t" in shown:
        message += "; indent with spaces, not tabs"
    return message


def _refuse_duplicates(path: Path, node: yaml.Node, trail: str = "", seen: set[int] | None = None) -> None:
    seen = set() if seen is None else seen
    if id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for number, item in enumerate(node.value):
            _refuse_duplicates(path, item, f"{trail}[{number}]", seen)
    if not isinstance(node, yaml.MappingNode):
        return
    first: dict[str, int] = {}
    for key, value in node.value:
        name = str(key.value)
        full = f"{trail}.{name}" if trail else name
        line = key.start_mark.line + 1
        if name in first and name != "<<":
            raise UserError(f"{path}:{line}: {full} is given twice; the first is on line {first[name]}")
        first[name] = line
        _refuse_duplicates(path, value, full, seen)


def option_source(option: str, value: str | None) -> Source | None:
    """A command-line option such as `--trainer.max_steps 3` as nested settings; None where it is not one.

    Args:
        option: the option with its dashes.
        value: its text, or None for a flag.
    """
    path = option.lstrip("-").removesuffix("+")
    if not option.startswith("--") or value is None or not path or "config" in path.split("."):
        return None
    try:
        node = yaml.compose(value, Loader=yaml.SafeLoader)
    except yaml.YAMLError:
        node = None
    mark = yaml.Mark("command line", 0, 0, 0, None, 0)
    node = node or yaml.ScalarNode("tag:yaml.org,2002:str", value, mark, mark)
    for part in reversed(path.split(".")):
        key = yaml.ScalarNode("tag:yaml.org,2002:str", part, mark, mark)
        node = yaml.MappingNode("tag:yaml.org,2002:map", [(key, node)], mark, mark)
    assert isinstance(node, yaml.MappingNode)
    return Source("command line", node, is_file=False)


def sources(argv: Sequence[str]) -> list[Source]:
    """Everything the arguments say, in order: config files and options, each with its lines.

    Args:
        argv: arguments after the verb, recipe names already replaced.

    Raises:
        UserError: a config file is missing or malformed.
    """
    found: list[Source] = []
    for option, value in split_options(argv):
        if option in CONFIG_OPTIONS:
            if value is None:
                raise UserError(f"{option} needs a file or the name of a recipe; see `lit-reason list`")
            found.append(read_config(value))
        else:
            source = option_source(option, value)
            if source:
                found.append(source)
    return found


def scalars(node: yaml.Node, seen: set[int] | None = None) -> Iterator[yaml.ScalarNode]:
    """Every scalar value below a node, keys left out."""
    seen = set() if seen is None else seen
    if id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.ScalarNode):
        yield node
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from scalars(item, seen)
    elif isinstance(node, yaml.MappingNode):
        for _, value in node.value:
            yield from scalars(value, seen)


def check_variables(given: Sequence[Source]) -> None:
    """Refuse `${vars.x}` where no source sets x.

    Args:
        given: what `sources` returned.

    Raises:
        UserError: names the file and line, and the nearest variable.
    """
    known: set[str] = set()
    for source in given:
        for key, value in source.root.value:
            if key.value == "vars" and isinstance(value, yaml.MappingNode):
                known |= {str(name.value) for name, _ in value.value}
    for source in given:
        for scalar in scalars(source.root):
            for name in VARIABLE.findall(scalar.value):
                if name.partition(".")[0] not in known:
                    listed = f"; variables: {', '.join(sorted(known))}" if known else "; there is no `vars:` block"
                    near = did_you_mean(name, known)
                    raise UserError(f"{source.where(scalar)}: ${{vars.{name}}} is not set{near}{listed}")
