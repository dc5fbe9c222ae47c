"""Tools: plain functions with a JSON schema, called with whatever a model wrote."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from transformers.utils import get_json_schema

from lit_reason.errors import UserError, did_you_mean

_JSON_TYPES: dict[str, tuple[type, ...]] = {
    "integer": (int,),
    "number": (int, float),
    "string": (str,),
    "boolean": (bool,),
    "array": (list,),
    "object": (dict,),
    "null": (type(None),),
}


class ToolError(Exception):
    """A call went wrong in a way the model can read about and mend."""


@dataclass(frozen=True)
class Tool:
    """A function that a model may call.

    Attributes:
        name: what the model calls it.
        schema: name, description and parameters as JSON schema, in the form chat templates read.
        function: what runs.
    """

    name: str
    schema: dict[str, Any]
    function: Callable[..., Any]

    @classmethod
    def of(cls, function: Callable[..., Any]) -> Tool:
        """A tool from a function with type hints and a Google-style docstring.

        Args:
            function: its name, description and arguments are what the model is told.

        Raises:
            UserError: an argument has no type hint or no line in the docstring.
        """
        try:
            schema = get_json_schema(function)
        except Exception as error:  # transformers raises one of its own classes, of several kinds
            raise UserError(f"{function.__name__} cannot be offered as a tool: {error}") from error
        return cls(function.__name__, schema, function)

    def call(self, arguments: Mapping[str, Any]) -> str:
        """Run the tool.

        Args:
            arguments: by name, as parsed from what the model wrote; of any type.

        Returns:
            The result as text.

        Raises:
            ToolError: the arguments do not fit, or the function raised; the message is for the model.
        """
        parameters = self.schema["function"]["parameters"]
        known: dict[str, Any] = parameters.get("properties", {})
        for name, value in arguments.items():
            if name not in known:
                raise ToolError(f"{self.name} has no argument '{name}'{did_you_mean(name, known)}")
            if (wrong := _misfit(value, known[name])) is not None:
                raise ToolError(f"{self.name}: argument '{name}' is {value!r}; it must be {wrong}")
        missing = [name for name in parameters.get("required", []) if name not in arguments]
        if missing:
            raise ToolError(f"{self.name} needs {', '.join(missing)}")
        try:
            return str(self.function(**arguments))
        except Exception as error:  # whatever a tool raises is the model's to read, never the end of a run
            raise ToolError(f"{type(error).__name__}: {error}") from error

    def signature(self) -> str:
        """The tool in one line, for a system prompt."""
        described = self.schema["function"]["description"]
        return f"{self.name}{inspect.signature(self.function, eval_str=True)}: {described}"


def call_tool(tools: Mapping[str, Tool], name: object, arguments: object) -> str:
    """Call a tool by the name that a model wrote.

    Args:
        tools: what is on offer.
        name: the name, of any type.
        arguments: the arguments, of any type.

    Returns:
        The result as text.

    Raises:
        ToolError: there is no such tool, or the call failed.
    """
    if not isinstance(name, str) or name not in tools:
        hint = did_you_mean(name, tools) if isinstance(name, str) else ""
        raise ToolError(f"there is no tool {name!r}; there are {', '.join(tools)}{hint}")
    if not isinstance(arguments, Mapping):
        raise ToolError(f"{name}: arguments are {arguments!r}; they must be an object")
    return tools[name].call(arguments)


def _misfit(value: Any, schema: Mapping[str, Any]) -> str | None:
    """What a value must be, if it is not that."""
    if "enum" in schema and value not in schema["enum"]:
        return "one of " + ", ".join(repr(v) for v in schema["enum"])
    kinds = schema.get("type")
    kinds = [kinds] if isinstance(kinds, str) else kinds or []
    allowed = tuple(t for kind in kinds for t in _JSON_TYPES.get(kind, (object,)))
    if not allowed or (isinstance(value, allowed) and not (isinstance(value, bool) and bool not in allowed)):
        return None
    return " or ".join(kinds)
