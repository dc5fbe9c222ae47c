"""Errors a user can act on. The command line prints them as one short message and exits with code 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something the user gave is wrong: message says what, where, and what is allowed."""


class RowError(UserError):
    """One row cannot be used; the row goes to quarantine with this message, the run goes on."""


class EmptyMask(RowError):
    """No token of the row would be trained."""


def did_you_mean(given: str, allowed: Iterable[str]) -> str:
    """The suggestion that ends an error message: ` (did you mean 'x'?)`, or an empty string without a near match.

    Capitals make no difference.

    Args:
        given: what the user wrote.
        allowed: the values that would have been accepted.
    """
    spelt = {str(a).casefold(): str(a) for a in allowed}
    near = difflib.get_close_matches(given.casefold(), spelt, n=1, cutoff=0.6)
    return f" (did you mean '{spelt[near[0]]}'?)" if near else ""
