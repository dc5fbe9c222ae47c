"""From a refused configuration to one short message: file and line, key, what was given, what is allowed.

The parser alone decides what is valid. Only when it refuses do these functions look for the culprit, by
walking each config file and option along the recipe schema; when they find none, the parser's own innermost
reason is told.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lit_reason.cli.config_files import Source, read_config, scalars
from lit_reason.errors import UserError, did_you_mean

SPEC_KEYS = ("class_path", "init_args", "dict_kwargs")
CLASS_NAME = re.compile(r"([\w.]+\.)?[A-Z]\w*")
SHOWN = 14
NOISE = ("Expected a <class 'NoneType'>", "Given value", "Subtypes:", "Errors:", "Does not validate")


@dataclass(frozen=True)
class Problem:
    """What is wrong with one key.

    Args:
        where: `file:line` or `command line`.
        key: dotted path.
        text: what is wrong, and what is allowed.
    """

    where: str
    key: str
    text: str

    def __str__(self) -> str:
        return f"{self.where}: {self.key}: {self.text}"


def listed(names: Iterable[Any], near: str = "") -> str:
    """Allowed names in one line; of many, those nearest to what was given.

    Args:
        names: all of them.
        near: what the user wrote.
    """
    every = [str(name) for name in names]
    if len(every) <= SHOWN:
        return ", ".join(every)
    closest = difflib.get_close_matches(near, every, n=5, cutoff=0.3)
    if closest:
        return f"{', '.join(closest)} and {len(every) - len(closest)} more"
    return f"{', '.join(every[:SHOWN])} and {len(every) - SHOWN} more"


class Walker:
    """Walks settings along a recipe schema and remembers which classes were chosen where.

    Args:
        schema: from `recipe_schema`.
    """

    def __init__(self, schema: dict[str, Any]) -> None:
        self.schema = schema
        self.chosen: dict[str, str] = {}

    def first_problem(self, given: Sequence[Source]) -> Problem | None:
        """The first key or value that the schema refuses, or None.

        Args:
            given: config files and options in the order in which they apply.
        """
        for source in given:
            self.note_classes(source.root, "")
        for source in given:
            if not source.is_file:
                self.note_classes(source.root, "")  # `--trainer.callbacks+=X --trainer.callbacks.key`: the newest X
            problem = self._walk(source, source.root, self.schema, "")
            if problem:
                return problem
        return None

    def note_classes(self, node: yaml.Node, path: str) -> None:
        """Remember the classes chosen at and below a node.

        Args:
            node: settings.
            path: its dotted place.
        """
        if not isinstance(node, yaml.MappingNode):
            return
        for key, value in node.value:
            here = f"{path}.{key.value}".lstrip(".")
            if key.value == "class_path" and isinstance(value, yaml.ScalarNode):
                self.chosen[_place(path)] = value.value
            elif isinstance(value, yaml.ScalarNode) and CLASS_NAME.fullmatch(value.value):
                self.chosen[_place(here)] = value.value  # `--model SFTRegime`
            self.note_classes(value, here)

    def keys_of_class(self, section: str, name: str) -> set[str] | None:
        """Arguments of a class in a top-level section; None for a class the schema does not know."""
        choice = self._resolve(self.schema["properties"][section])
        arguments = choice["x-classes"].get(name)
        return None if arguments is None else set(self._resolve(arguments)["properties"])

    def _resolve(self, schema: dict[str, Any]) -> dict[str, Any]:
        while "$ref" in schema:
            schema = self.schema["$defs"][schema["$ref"].rpartition("/")[2]]
        return schema

    def _branches(self, schema: dict[str, Any]) -> list[dict[str, Any]]:
        """The alternatives of a schema, nested ones flattened; a class choice stays whole."""
        schema = self._resolve(schema)
        if "anyOf" not in schema or "x-classes" in schema:
            return [schema]
        return [leaf for branch in schema["anyOf"] for leaf in self._branches(branch)]

    def _walk(self, source: Source, node: yaml.Node, schema: dict[str, Any], path: str) -> Problem | None:
        branches = self._branches(schema)
        if isinstance(node, yaml.ScalarNode):
            return self._walk_scalar(source, node, branches, path)
        if isinstance(node, yaml.SequenceNode):
            return self._walk_list(source, node, branches, path)
        assert isinstance(node, yaml.MappingNode)
        for branch in branches:
            if "x-classes" in branch:
                return self._walk_class(source, node, branch, path)
            if "properties" in branch:
                return self._walk_keys(source, node, branch, path)
        if any(_is_anything(branch) or branch.get("type") == "object" for branch in branches):
            return None
        return Problem(source.where(node), path, f"is a mapping; expected {self._expected(branches)}")

    def _walk_keys(self, source: Source, node: yaml.MappingNode, schema: dict[str, Any], path: str) -> Problem | None:
        known = schema["properties"]
        for key, value in node.value:
            name = str(key.value)
            here = f"{path}.{name}".lstrip(".")
            if name in known:
                problem = self._walk(source, value, known[name], here)
                if problem:
                    return problem
            elif not schema.get("additionalProperties") and name != "<<":
                names = [one for one in known if not one.endswith("+")]
                owner = schema.get("x-of")
                label = f"keys of {owner}" if owner else "keys here"
                text = f"unknown key{did_you_mean(name, names)}; {label}: {listed(names, name)}"
                return Problem(source.where(key), here, text)
        return None

    def _walk_class(self, source: Source, node: yaml.MappingNode, schema: dict[str, Any], path: str) -> Problem | None:
        entries = {str(key.value): (key, value) for key, value in node.value}
        if "class_path" in entries:
            problem = self._class_problem(source, entries["class_path"][1], schema, f"{path}.class_path")
            if problem:
                return problem
        spec = any(name in entries for name in SPEC_KEYS)
        if source.is_file and spec:
            for name, (key, _) in entries.items():
                if name not in SPEC_KEYS and name != "<<":
                    near = did_you_mean(name, SPEC_KEYS)
                    text = f"unknown key{near}; the arguments of a class go under init_args"
                    return Problem(source.where(key), f"{path}.{name}", text)
        chosen = entries["class_path"][1].value if "class_path" in entries else self.chosen.get(_place(path))
        arguments = schema["x-classes"].get(chosen)
        if arguments is None:
            return None
        inner, at = (entries.get("init_args", (None, None))[1], f"{path}.init_args") if spec else (node, path)
        if isinstance(inner, yaml.MappingNode):
            return self._walk_keys(source, inner, self._resolve(arguments), at)
        return None

    def _class_problem(self, source: Source, node: yaml.Node, schema: dict[str, Any], path: str) -> Problem | None:
        given, known = str(node.value), schema["x-classes"]
        if given in known or given.startswith("${"):
            return None
        short = [name for name in known if "." not in name]
        if "." in given and not given.startswith(("lit_reason.", "lightning.")):
            return None  # a class from elsewhere: only importing it can tell
        last = given.rpartition(".")[2]
        near = did_you_mean(last, short)
        text = f"no {schema['x-base']} is called {given!r}{near}; known: {listed(short, last)}"
        return Problem(source.where(node), path, text)

    def _walk_list(
        self, source: Source, node: yaml.SequenceNode, branches: list[dict[str, Any]], path: str
    ) -> Problem | None:
        arrays = [branch for branch in branches if branch.get("type") == "array"]
        if arrays:
            for number, item in enumerate(node.value):
                problem = self._walk(source, item, arrays[0].get("items", {}), f"{path}[{number}]")
                if problem:
                    return problem
            return None
        if any(_is_anything(branch) for branch in branches):
            return None
        return Problem(source.where(node), path, f"is a list; expected {self._expected(branches)}")

    def _walk_scalar(
        self, source: Source, node: yaml.ScalarNode, branches: list[dict[str, Any]], path: str
    ) -> Problem | None:
        structured = [branch for branch in branches if "x-classes" in branch or "properties" in branch]
        if structured and node.value.endswith((".yaml", ".yml", ".json")):
            return self._walk_section(source, node, structured[0], path)
        if any(self._accepts(branch, node) for branch in branches):
            return None
        for branch in structured:
            if "x-classes" in branch:
                return self._class_problem(source, node, branch, path)
        choices = [str(choice) for branch in branches for choice in branch.get("enum", [])]
        near = did_you_mean(node.value, choices)
        return Problem(source.where(node), path, f"got {node.value!r}; expected {self._expected(branches)}{near}")

    def _walk_section(self, source: Source, node: yaml.ScalarNode, schema: dict[str, Any], path: str) -> Problem | None:
        for folder in (Path(source.name).parent, Path()):
            if (folder / node.value).is_file():
                section = read_config(folder / node.value)
                self.note_classes(section.root, path)
                return self._walk(section, section.root, schema, path)
        return Problem(source.where(node), path, f"no such file: {node.value!r}")

    @staticmethod
    def _accepts(branch: dict[str, Any], node: yaml.ScalarNode) -> bool:
        text, tag = node.value, node.tag.rpartition(":")[2]
        if _is_anything(branch) or "${" in text:
            return True
        if "enum" in branch:
            return text in [str(choice) for choice in branch["enum"]]
        if "x-classes" in branch:
            return text in branch["x-classes"]
        kinds = branch.get("type", [])
        for kind in [kinds] if isinstance(kinds, str) else kinds:
            if kind == "string" and "pattern" not in branch:
                return True
            if kind == "null" and tag == "null":
                return True
            if kind == "boolean" and text.lower() in ("true", "false", "yes", "no", "on", "off"):
                return True
            if kind == "integer" and re.fullmatch(r"[-+]?[\d_]+", text):
                return True
            if kind == "number" and _is_number(text):
                return True
        return False

    def _expected(self, branches: list[dict[str, Any]]) -> str:
        choices = dict.fromkeys(str(choice) for branch in branches for choice in branch.get("enum", []))
        words = ["one of " + listed(choices)] if choices else []
        for branch in branches:
            kinds = branch.get("type", [])
            if "enum" in branch:
                continue
            if "x-classes" in branch:
                words.append(f"a {branch['x-base']} (class_path and init_args)")
            elif "properties" in branch:
                words.append("a mapping")
            elif branch is not self.schema["$defs"].get("interpolation"):
                names = {
                    "null": "null",
                    "integer": "a whole number",
                    "number": "a number",
                    "boolean": "true or false",
                }
                names |= {"string": "text", "array": "a list", "object": "a mapping"}
                words += [names[kind] for kind in ([kinds] if isinstance(kinds, str) else kinds)]
        return " or ".join(dict.fromkeys(words))


def _place(path: str) -> str:
    """A dotted place as options write it, which leave out `init_args`."""
    return path.replace(".init_args", "")


def _is_anything(schema: dict[str, Any]) -> bool:
    return not schema.keys() & {"type", "enum", "anyOf", "$ref", "properties", "x-classes"}


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))  # the parser takes neither nan nor inf
    except ValueError:
        return False


def chosen_classes(given: Sequence[Source]) -> dict[str, list[str]]:
    """For each dotted place, the classes that sources choose there, in order and without repetitions.

    Args:
        given: config files and options in order.
    """
    found: dict[str, list[str]] = {}
    for source in given:
        walker = Walker({})
        walker.note_classes(source.root, "")
        for place, name in walker.chosen.items():
            if name not in found.setdefault(place, []):
                found[place].append(name)
    return found


def dropped_settings(given: Sequence[Source], schema: dict[str, Any]) -> list[str]:
    """Notes on settings that a later change of class leaves behind; the parser drops them without a word.

    It keeps what the new class also has, unless an interpolation `${...}` stands in it.

    Args:
        given: config files and options in order.
        schema: from `recipe_schema`.
    """
    notes: list[str] = []
    for section in ("model", "data"):
        chosen = ""
        kept: dict[str, tuple[str, yaml.Node]] = {}
        known = Walker(schema)
        for source in given:
            now = Walker(schema)
            now.note_classes(source.root, "")
            name = now.chosen.get(section, chosen)
            if chosen and name.rpartition(".")[2] != chosen.rpartition(".")[2]:
                keys = known.keys_of_class(section, name)
                for key, (where, value) in list(kept.items()):
                    has_variable = any("${" in scalar.value for scalar in scalars(value))
                    if keys is not None and (key not in keys or has_variable):
                        why = "holds an interpolation" if key in keys else f"is no setting of {name}"
                        notes.append(f"{where}: {section}.init_args.{key} is dropped by the change to {name}: it {why}")
                        del kept[key]
            chosen = name
            kept.update(_settings_of(source, section))
            notes = [note for note in notes if not any(f".{key} is dropped" in note for key in kept)]
    return notes


def _settings_of(source: Source, section: str) -> dict[str, tuple[str, yaml.Node]]:
    """The init_args that a source gives in a section: key -> (place, value)."""
    found: dict[str, tuple[str, yaml.Node]] = {}
    for key, block in source.root.value:
        if key.value != section or not isinstance(block, yaml.MappingNode):
            continue
        for name, value in block.value:
            if name.value == "init_args" and isinstance(value, yaml.MappingNode):
                found |= {str(k.value): (source.where(k), v) for k, v in value.value}
            elif name.value not in SPEC_KEYS:
                found[str(name.value)] = (source.where(name), value)
    return found


def explain(error: Exception, given: Sequence[Source], schema: dict[str, Any], options: Iterable[str]) -> UserError:
    """The message for a configuration that the parser refused.

    Args:
        error: what the parser raised.
        given: config files and options.
        schema: from `recipe_schema`.
        options: the words of the command line, to tell stray ones.
    """
    if type(error).__name__.startswith(("Interpolation", "Grammar")):
        return UserError(_interpolation_message(error, given))
    problem = Walker(schema).first_problem(given)
    return UserError(str(problem) if problem else innermost(str(error), options))


def _interpolation_message(error: Exception, given: Sequence[Source]) -> str:
    lines = str(error).splitlines()
    key = next((line.split(":", 1)[1].strip() for line in lines if "full_key:" in line), "")
    wanted = re.search(r"'([^']+)'", lines[0])
    for source in given:
        for scalar in scalars(source.root):
            if "${" in scalar.value and wanted and wanted[1] in scalar.value:
                return f"{source.where(scalar)}: {key}: {scalar.value} cannot be resolved: {lines[0]}"
    return f"{key}: cannot be resolved: {lines[0]}"


def innermost(text: str, options: Iterable[str] = ()) -> str:
    """The true cause inside the parser's nested error, in one line.

    Args:
        text: the parser's message.
        options: the words of the command line.
    """
    lines = [line.strip(" -\t") for line in text.splitlines() if line.strip(" -\t")]
    keys = [match[1] for line in lines if (match := re.match(r'Parser key "([^"]+)":?', line))]
    causes = [line for line in lines if not line.startswith(NOISE) and not line.startswith("Problem with given")]
    causes = [re.sub(r'^Parser key "[^"]+":\s*', "", line) for line in causes]
    cause = next((line for line in causes if line), lines[0] if lines else text)
    if "arguments are required" in cause:
        wanted = cause.rpartition(":")[2].strip()
        if not keys:
            return f"required and not given: {wanted}; start from a recipe with --config (see `lit-reason list`)"
        return f"{'.'.join(keys)}.init_args lacks required settings: {wanted}"
    cause = re.sub("^unrecognized arguments", "unknown option", cause, flags=re.IGNORECASE)
    return f"{'.'.join(keys)}: {cause}" if keys else cause
