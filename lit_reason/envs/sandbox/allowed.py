"""What the source of model-written Python may say: the first of the sandbox's layers, and the one with readable errors.

It is not the wall. The wall is the process around it (`jail`); this page keeps most attempts from ever reaching it, and
tells the model what to write instead.
"""

from __future__ import annotations

import ast

from lit_reason.errors import did_you_mean

MODULES = (
    *("bisect", "cmath", "collections", "datetime", "decimal", "fractions", "functools", "heapq", "itertools"),
    *("json", "math", "operator", "random", "re", "statistics", "string"),
)
BUILTINS = (
    *("abs", "all", "any", "ascii", "bin", "bool", "bytearray", "bytes", "chr", "complex", "dict", "divmod"),
    *("enumerate", "filter", "float", "format", "frozenset", "hash", "hex", "int", "isinstance", "issubclass", "iter"),
    *("len", "list", "map", "max", "min", "next", "oct", "ord", "pow", "print", "range", "repr", "reversed", "round"),
    *("set", "slice", "sorted", "str", "sum", "tuple", "zip", "property", "staticmethod", "classmethod", "super"),
    *("object", "ArithmeticError", "AssertionError", "Exception", "IndexError", "KeyError", "LookupError"),
    *("NotImplementedError", "OverflowError", "RuntimeError", "StopIteration", "TypeError", "ValueError"),
    *("ZeroDivisionError", "RecursionError", "True", "False", "None", "NotImplemented", "Ellipsis"),
)
# Ways from a value to the interpreter that have no underscore in front.
HIDDEN_ATTRIBUTES = frozenset(
    f"{kind}_{part}"
    for kind in ("gi", "cr", "ag", "f", "tb", "co", "func")
    for part in (
        "frame",
        "code",
        "await",
        "back",
        "builtins",
        "globals",
        "locals",
        "next",
        "closure",
        "defaults",
        "trace",
    )
)
LONGEST_SOURCE = 20_000  # characters; the parser itself is not built for hostile megabytes


class NotAllowed(Exception):
    """The source says something that a sandboxed program may not say; the message is for the model."""


def check_source(source: str) -> None:
    """Refuse source that reaches for more than computing and printing.

    Args:
        source: Python.

    Raises:
        NotAllowed: a syntax error, a module or name that is not on offer, or an underscore where internals begin.
    """
    if len(source) > LONGEST_SOURCE:
        raise NotAllowed(f"the program has {len(source)} characters; at most {LONGEST_SOURCE} are allowed")
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise NotAllowed(f"the program cannot be read: {error}") from error
    for node in ast.walk(tree):
        if (wrong := _wrong(node)) is not None:
            line = getattr(node, "lineno", "?")
            raise NotAllowed(f"line {line}: {wrong}")


def _wrong(node: ast.AST) -> str | None:
    if isinstance(node, ast.Import):
        return next((_no_module(a.name) for a in node.names if a.name not in MODULES), None)
    if isinstance(node, ast.ImportFrom):
        if node.level or node.module not in MODULES:
            return _no_module("." * node.level + (node.module or ""))
        return next((_private(a.name) for a in node.names if a.name.startswith("_") or a.name == "*"), None)
    if isinstance(node, ast.Attribute) and (node.attr.startswith("_") or node.attr in HIDDEN_ATTRIBUTES):
        return _private(node.attr) if node.attr != "__init__" else None
    if isinstance(node, ast.Name) and node.id.startswith("__"):
        return _private(node.id)
    return None


def _no_module(name: str) -> str:
    return f"there is no module '{name}' here; there are {', '.join(MODULES)}{did_you_mean(name, MODULES)}"


def _private(name: str) -> str:
    return f"'{name}' is internal and not available here"
