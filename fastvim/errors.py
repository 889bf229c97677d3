"""Mistakes in the user's input, as opposed to bugs."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class UserError(ValueError):
    """A mistake in the user's input. The message is one line: the value, and what was expected.

    The command line prints the line and exits with code 2. Any other error is a bug and keeps its
    traceback.
    """


def nearest(name: str, valid: Iterable[str], count: int = 3) -> str:
    """`" (nearest: a, b)"` for a mistyped `name`, or an empty string if nothing is similar."""
    matches = difflib.get_close_matches(name, list(valid), n=count, cutoff=0.5)
    return f" (nearest: {', '.join(matches)})" if matches else ""


def first_few(values: Sequence[object], most: int = 3) -> str:
    """`"a, b, c and 4 more"`."""
    more = f" and {len(values) - most} more" if len(values) > most else ""
    return ", ".join(map(str, values[:most])) + more
