"""What a `CondenseConfig` may hold. Imports neither torch nor a tokenizer."""

from __future__ import annotations

import re
from typing import Literal, get_args, get_origin, get_type_hints

from lit_reason.data.config import CondenseConfig
from lit_reason.errors import UserError, did_you_mean


def check_config(config: CondenseConfig) -> re.Pattern[str] | None:
    """Refuse settings that are unknown, out of range or contradict each other.

    Args:
        config: what the recipe or the command line says.

    Returns:
        The compiled pattern of the `regex` segmenter, None for the others.

    Raises:
        UserError: names the setting, what was given and what is allowed.
    """
    for name, kind in get_type_hints(CondenseConfig).items():
        if get_origin(kind) is Literal:
            given, allowed = getattr(config, name), get_args(kind)
            if given not in allowed:
                near = did_you_mean(str(given), allowed)
                raise UserError(f"condense: unknown {name} '{given}': allowed are {', '.join(allowed)}{near}")
    if not _is_number(config.tau) or not 0 < config.tau <= 1:
        raise UserError(f"condense: tau is {config.tau}, it must lie in (0, 1]: the share that is kept")
    if not _is_number(config.rho) or not 0 <= config.rho <= 1:
        raise UserError(f"condense: rho is {config.rho}, it must lie in [0, 1]: the share taken from the end")
    for name in ("min_chars", "min_tokens", "protect_last"):
        value = getattr(config, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise UserError(f"condense: {name} is {value}, it must be a whole number, 0 or more")
    if (config.segmenter == "regex") != (config.pattern is not None):
        raise UserError("condense: segmenter 'regex' and pattern belong together: give both or neither")
    if config.pattern is None:
        return None
    try:
        return re.compile(config.pattern)
    except re.error as error:
        raise UserError(f"condense: pattern {config.pattern!r} is no regular expression: {error}") from error


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
