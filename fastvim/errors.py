"""The error of a user's mistake, told from a defect of ours."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class UserError(ValueError):
    """A mistake in what the user gave: one line that names the value and what was expected.

    The command line prints the line and exits with code 2. Anything else that is raised is a
    defect of the library and keeps its traceback.
    """


def nearest(name: str, valid: Iterable[str], count: int = 3) -> str:
    """`" (nearest: a, b)"` for a mistyped `name`, or an empty string when nothing is near."""
    matches = difflib.get_close_matches(name, list(valid), n=count, cutoff=0.5)
    return f" (nearest: {', '.join(matches)})" if matches else ""


def first_few(values: Sequence[object], most: int = 3) -> str:
    """`"a, b, c and 4 more"`."""
    more = f" and {len(values) - most} more" if len(values) > most else ""
    return ", ".join(map(str, values[:most])) + more
