"""A JSON Schema of recipes, made from the signatures and docstrings of the classes a recipe may name.

One schema serves three readers: editors (completion and red lines while typing), the error messages of the
command line (`messages.py` walks it to find the nearest key), and the tests of the shipped recipes.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import enum
import inspect
import json
import re
import sys
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any, Literal, Union, get_args, get_origin

from lit_reason.cli.command_parser import CommandParser
from lit_reason.errors import UserError, did_you_mean

URI = "https://json-schema.org/draft/2020-12/schema"
INTERPOLATION = {"type": "string", "pattern": r"\$\{.+\}", "description": "a value from elsewhere: ${vars.x}"}
LEAVES: dict[Any, dict[str, Any]] = {
    bool: {"type": "boolean"},
    int: {"type": "integer"},
    float: {"type": "number"},
    str: {"type": "string"},
    type(None): {"type": "null"},
}
LISTS = (list, set, tuple, frozenset, collections.abc.Sequence, collections.abc.Iterable, collections.abc.Set)
MAPPINGS = (dict, collections.abc.Mapping, collections.abc.MutableMapping)
ENUMERATED = ("lightning.", "lit_reason.")


def docstring_args(owner: Any) -> dict[str, str]:
    """Text of each argument in a Google-style `Args:` block, on one line each.

    Args:
        owner: class or function; of a class, its own docstring and then that of `__init__` are read.
    """
    found: dict[str, str] = {}
    documents = [inspect.getdoc(owner), inspect.getdoc(getattr(owner, "__init__", None))]
    for document in documents if inspect.isclass(owner) else documents[:1]:
        block = re.search(r"^Args:\n(.*?)(?=^\S|\Z)", document or "", re.MULTILINE | re.DOTALL)
        if not block:
            continue
        for name, text in re.findall(
            r"^ {4}(\w+)[^:\n]*:(.*(?:\n(?: {8}.*|[ \t]*(?=\n|\Z)))*)", block[1], re.MULTILINE
        ):
            found.setdefault(name, " ".join(text.split()))
    return found


def parameters(owner: Any) -> tuple[dict[str, inspect.Parameter], bool]:
    """The named parameters of a class or function, those that reach a parent through **kwargs included.

    Args:
        owner: class or function.

    Returns:
        name -> parameter, and whether further names are accepted.
    """
    if not inspect.isclass(owner):
        return _split(owner)
    found: dict[str, inspect.Parameter] = {}
    is_open = False
    for base in owner.__mro__:
        init = base.__dict__.get("__init__")
        if init is None or base.__module__.startswith(("torch.nn.modules", "lightning.pytorch.core")):
            continue
        own, is_open = _split(init)
        for name, parameter in own.items():
            found.setdefault(name, parameter)
        if not is_open:
            break
    else:
        is_open = False
    return found, is_open


def _split(function: Any) -> tuple[dict[str, inspect.Parameter], bool]:
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return {}, True
    try:
        hints = typing.get_type_hints(inspect.unwrap(function))
    except Exception:  # names that exist for type checkers alone: the key is still known, its type is not
        hints = {}
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    named = {
        name: parameter.replace(annotation=hints.get(name, Any))
        for name, parameter in signature.parameters.items()
        if parameter.kind not in kinds and name != "self"
    }
    return named, any(p.kind is inspect.Parameter.VAR_KEYWORD for p in signature.parameters.values())


def class_names(cls: type) -> list[str]:
    """The names under which a recipe may write a class: the short one, the public path, the full path."""
    names = [cls.__name__]
    parts = cls.__module__.split(".")
    for end in range(1, len(parts) + 1):
        module = sys.modules.get(".".join(parts[:end]))
        if getattr(module, cls.__name__, None) is cls:
            names.append(f"{'.'.join(parts[:end])}.{cls.__name__}")
    return names


def subclasses(base: type) -> list[type]:
    """All concrete subclasses that are imported now, the base itself included, sorted by name."""
    found: set[type] = set()
    todo = [base]
    while todo:
        cls = todo.pop()
        if cls not in found:
            found.add(cls)
            todo += type.__subclasses__(cls)
    concrete = [cls for cls in found if not inspect.isabstract(cls) and not cls.__name__.startswith("_")]
    return sorted(concrete, key=lambda cls: (cls.__name__, cls.__module__))


class SchemaBuilder:
    """Collects the definitions that classes need.

    Args:
        roots: base classes whose subclasses are listed wherever they come from.
    """

    def __init__(self, roots: Iterable[type] = ()) -> None:
        self.roots = tuple(roots)
        self.definitions: dict[str, dict[str, Any]] = {"interpolation": dict(INTERPOLATION)}
        self.owners: dict[str, Any] = {}

    def type_schema(self, annotation: Any) -> dict[str, Any]:
        """Schema of one type annotation; what cannot be described accepts anything (`{}`).

        Args:
            annotation: the type.
        """
        if annotation in LEAVES if isinstance(annotation, type) else False:
            return dict(LEAVES[annotation])
        if annotation is None:
            return {"type": "null"}
        origin, args = get_origin(annotation), get_args(annotation)
        if origin is Literal:
            return {"enum": list(args)}
        if origin in (Union, types.UnionType):
            return self._union([self.type_schema(arg) for arg in args])
        if origin is typing.Annotated:
            return self.type_schema(args[0])
        kind = origin or annotation
        if kind is Callable and args and inspect.isclass(args[-1]):
            return self._class_schema(args[-1])  # something that makes one: the class with its settings
        if kind in LISTS:
            items = self.type_schema(args[0]) if len(args) == 1 or args[1:] == (...,) else {}
            return {"type": "array", **({"items": items} if items else {})}
        if kind in MAPPINGS:
            values = self.type_schema(args[1]) if len(args) == 2 else {}
            return {"type": "object", **({"additionalProperties": values} if values else {})}
        return self._class_schema(annotation) if inspect.isclass(annotation) and origin is None else {}

    def _class_schema(self, cls: type) -> dict[str, Any]:
        if issubclass(cls, enum.Enum):
            return {"enum": list(cls.__members__)}
        if issubclass(cls, PurePath):
            return {"type": "string"}
        if dataclasses.is_dataclass(cls):
            return self.closed(cls)
        if cls in self.roots or f"{cls.__module__}.".startswith(ENUMERATED):
            return self.subclass_of(cls)
        return {}

    @staticmethod
    def _union(branches: list[dict[str, Any]]) -> dict[str, Any]:
        unique = [branch for number, branch in enumerate(branches) if branch not in branches[:number]]
        if {} in unique:
            return {}
        return unique[0] if len(unique) == 1 else {"anyOf": unique}

    def _define(self, name: str, owner: Any, build: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        while self.owners.get(name, owner) is not owner:
            name += "_"
        if name not in self.definitions:
            self.owners[name] = owner
            self.definitions[name] = {}  # placeholder, so that a recursive type ends
            self.definitions[name] = build()
        return {"$ref": f"#/$defs/{name}"}

    def closed(self, owner: Any) -> dict[str, Any]:
        """Reference to an object whose keys are the parameters of a class.

        Args:
            owner: the class.
        """
        return self._define(owner.__name__, owner, lambda: self.keys_of(owner))

    def keys_of(self, owner: Any, skip: Iterable[str] = ()) -> dict[str, Any]:
        """Schema of an object whose keys are the parameters of a class or function.

        Args:
            owner: class or function.
            skip: parameters that recipes do not set.
        """
        named, is_open = parameters(owner)
        texts: dict[str, str] = {}
        for base in reversed(owner.__mro__ if inspect.isclass(owner) else [owner]):
            texts.update(docstring_args(base))
        properties: dict[str, Any] = {}
        for name, parameter in named.items():
            if name in skip:
                continue
            schema = self._property(self.type_schema(parameter.annotation))
            if texts.get(name):
                schema["description"] = texts[name]
            if isinstance(parameter.default, (str, int, float, bool)):
                schema["default"] = parameter.default
            properties[name] = schema
        return {
            "type": "object",
            "properties": properties,
            "additionalProperties": is_open,
            "x-of": owner.__name__,
        }

    @staticmethod
    def _property(schema: dict[str, Any]) -> dict[str, Any]:
        if not schema or schema == {"type": "string"}:
            return dict(schema)
        return {"anyOf": [*schema.get("anyOf", [schema]), {"$ref": "#/$defs/interpolation"}]}

    def subclass_of(self, base: type) -> dict[str, Any]:
        """Reference to a class choice: a name alone, or `class_path` with `init_args`.

        Args:
            base: the class whose subclasses are allowed.
        """
        return self._define(f"any_{base.__name__}", base, lambda: self._choices(base))

    def _choices(self, base: type) -> dict[str, Any]:
        branches: list[dict[str, Any]] = [{"type": "string", "description": "a class, or a file with its settings"}]
        arguments: dict[str, Any] = {}
        for cls in subclasses(base):
            names, ref = class_names(cls), self.closed(cls)
            arguments.update({name: ref for name in names if name not in arguments})
            branches.append(
                {
                    "type": "object",
                    "description": (inspect.getdoc(cls) or "").partition("\n")[0],
                    "required": ["class_path"],
                    "properties": {
                        "class_path": {"enum": names},
                        "init_args": ref,
                        "dict_kwargs": {"type": "object"},
                    },
                    "additionalProperties": False,
                }
            )
        other = {"type": "string", "pattern": r"\.", "not": {"enum": sorted(arguments)}}
        free = {"init_args": {"type": "object"}, "dict_kwargs": {"type": "object"}}
        branches.append(
            {
                "type": "object",
                "description": "a class of your own by its full path",
                "required": ["class_path"],
                "properties": {"class_path": other, **free},
                "additionalProperties": False,
            }
        )
        branches.append({"type": "object", "description": "more settings for the class an earlier file chose"})
        branches[-1].update(properties=free, additionalProperties=False)
        return {"anyOf": branches, "x-base": base.__name__, "x-classes": arguments}


def recipe_schema(
    sections: Mapping[str, Any], functions: Iterable[Any], *, title: str = "lit-reason recipe"
) -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a whole recipe.

    Args:
        sections: top-level key -> class whose parameters are its keys, or a one-element tuple with the base
            class whose subclasses may be chosen there.
        functions: the trainer's verbs; their parameters, but for the objects the command line hands over
            itself, are top-level keys too.
        title: name shown by editors.

    Returns:
        The schema as plain data.
    """
    builder = SchemaBuilder([base[0] for base in sections.values() if isinstance(base, tuple)])
    properties: dict[str, Any] = {}
    for function in functions:
        handed = ("model", "datamodule", "dataloaders", "train_dataloaders", "val_dataloaders")
        properties.update(builder.keys_of(function, skip=handed)["properties"])
    properties["seed_everything"] = {
        "type": ["boolean", "integer"],
        "description": "seed of everything random",
    }
    properties["vars"] = {"type": "object", "description": "your own numbers, read with ${vars.name}"}
    for key, owner in sections.items():
        properties[key] = builder.subclass_of(owner[0]) if isinstance(owner, tuple) else builder.closed(owner)
    schema = {
        "$schema": URI,
        "title": title,
        "type": "object",
        "properties": properties,
        "additionalProperties": False,
        "$defs": builder.definitions,
    }
    _allow_appending(schema)
    return schema


def _allow_appending(schema: Any) -> None:
    """Add `key+` beside every key that takes a list of classes: it appends to the list of an earlier file."""
    if isinstance(schema, list):
        for item in schema:
            _allow_appending(item)
    if not isinstance(schema, dict):
        return
    for value in schema.values():
        _allow_appending(value)
    properties = schema.get("properties")
    if isinstance(properties, dict) and "x-of" in schema:
        for name, value in list(properties.items()):
            if any(branch.get("type") == "array" for branch in value.get("anyOf", [])):
                properties[f"{name}+"] = {**value, "description": f"append to {name} of an earlier file"}


def part_of(schema: dict[str, Any], name: str) -> dict[str, Any]:
    """The schema of one class's arguments, with the definitions it needs.

    Args:
        schema: of whole recipes.
        name: class, short or full.

    Raises:
        UserError: no class of recipes has that name.
    """
    known: dict[str, str] = {key: key for key, value in schema["$defs"].items() if "x-of" in value}
    for definition in schema["$defs"].values():
        known |= {key: ref["$ref"].rpartition("/")[2] for key, ref in definition.get("x-classes", {}).items()}
    if name not in known:
        raise UserError(f"no class {name!r} in recipes{did_you_mean(name, known)}")
    definitions, todo = {}, [known[name]]
    while todo:
        key = todo.pop()
        if key not in definitions:
            definitions[key] = schema["$defs"][key]
            todo += re.findall(r'"\$ref": "#/\$defs/([^"]+)"', json.dumps(definitions[key]))
    top = definitions[known[name]]
    return {"$schema": URI, "title": name, **top, "$defs": definitions}


def build_parser() -> CommandParser:
    """The command's parser."""
    parser = CommandParser("schema", "JSON schema of recipes, for editors.")
    parser.add_argument("name", nargs="?", metavar="CLASS", help="only the arguments of this class")
    parser.add_argument("--write", metavar="FILE", help="write it to a file and say how editors find it")
    return parser


def main(argv: Sequence[str]) -> int:
    """`schema [CLASS] [--write FILE]`: print or write the schema of recipes, or of one class's arguments.

    Args:
        argv: arguments after the verb.
    """
    given = build_parser().parse_args(argv)

    from lit_reason.cli.reason_cli import house_classes, schema_for
    from lit_reason.data.reading.row_files import complete_or_absent

    schema = schema_for(*house_classes())
    text = json.dumps(part_of(schema, given.name) if given.name else schema, indent=1, ensure_ascii=False) + "\n"
    if given.write is None:
        sys.stdout.write(text)
        return 0
    with complete_or_absent(Path(given.write)) as unfinished:
        unfinished.write_text(text, encoding="utf-8")
    print(f"wrote {given.write}; put this line at the top of a recipe beside it:")
    print(f"# yaml-language-server: $schema={Path(given.write).name}")
    return 0
