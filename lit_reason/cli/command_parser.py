"""The parser of a verb's own options: what it refuses becomes one short message with the nearest match."""

from __future__ import annotations

import argparse
import re
import sys
from typing import Any, NoReturn

from lit_reason.errors import UserError, did_you_mean


class CommandParser(argparse.ArgumentParser):
    """An argument parser that takes no abbreviations and refuses with a UserError.

    Args:
        verb: the verb whose options it reads.
        description: what the verb does.
        epilog: shown below the options as it stands, line breaks included.
        kwargs: as in `argparse.ArgumentParser`.
    """

    def __init__(self, verb: str, description: str, epilog: str | None = None, **kwargs: Any) -> None:
        layout = argparse.RawDescriptionHelpFormatter if epilog else argparse.HelpFormatter
        super().__init__(
            f"lit-reason {verb}",
            description=description,
            epilog=epilog,
            formatter_class=layout,
            allow_abbrev=False,
            **kwargs,
        )
        self.verb = verb
        self.given: list[str] = []

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse, and remember what was given for the message of a refusal."""
        self.given = list(sys.argv[1:] if args is None else args)
        return super().parse_known_args(self.given, namespace)

    def error(self, message: str) -> NoReturn:
        """Raise what argparse would print, with the nearest option or choice.

        Args:
            message: of argparse.

        Raises:
            UserError: always.
        """
        options = self.options()
        words = [word.partition("=")[0] for word in self.given]
        stray = next((word for word in words if word.startswith("--") and word not in options), "")
        near = ""
        if message.startswith("unrecognized arguments"):
            near = did_you_mean(stray, options)
        elif message.startswith("the following arguments are required"):
            hint = did_you_mean(stray, options)
            near = f"; {stray} is no option{hint}" if hint else ""
        elif choice := re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message):
            near = did_you_mean(choice[1], re.findall(r"[^\s,']+", choice[2]))
        raise UserError(f"{self.verb}: {message}{near}\nSee lit-reason {self.verb} --help")

    def options(self) -> list[str]:
        """Every long option."""
        return [word for action in self._actions for word in action.option_strings if word.startswith("--")]
