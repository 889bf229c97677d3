"""Mistakes in the user's input, as opposed to bugs."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


class UserError(ValueError):
    """A mistake in the user's input. The message is one line: the value, and what was expected.

    The command line prints the line and exits with code 2. Any other error is a bug and keeps its
    traceback.
    """


class MachineError(UserError):
    """What the machine does not give: room on a disk, a permission, a process that was lost.

    The command line prints the line and exits with code 1.
    """


NOT_FINITE = "the model's result is not finite"


class NotFiniteError(UserError):
    """A result that is not finite: no answer."""


def require_finite(*results: Tensor) -> None:
    """Raise NotFiniteError for results of a model that are not finite."""
    if not all(result.isfinite().all() for result in results):
        raise NotFiniteError(NOT_FINITE)


class OptionError(UserError):
    """An option with a value that it cannot have.

    The command line writes the option as the user does: `data.batch_size`.

    Args:
        option: its name.
        value: that was given.
        expected: instead.
    """

    def __init__(self, option: str, value: object, expected: str) -> None:
        self.option, self.value, self.expected = option, value, expected
        shown = list(value) if isinstance(value, tuple) else value
        text = repr(shown) if isinstance(shown, str) else str(shown)
        super().__init__(f"{option} {text}: expected {expected}")

    def __reduce__(self) -> tuple[type, tuple[object, ...]]:
        return type(self), (self.option, self.value, self.expected)


def nearest(name: str, valid: Iterable[str], count: int = 3) -> str:
    """`" (nearest: a, b)"` for a mistyped `name`, or an empty string if nothing is similar."""
    matches = difflib.get_close_matches(name, list(valid), n=count, cutoff=0.5)
    return f" (nearest: {', '.join(matches)})" if matches else ""


def counted(number: int, what: str) -> str:
    """`"1 image of cats"` or `"2,000 images of cats"`.

    Args:
        number: of them.
        what: they are, beginning with a noun in the plural.
    """
    if number == 1:
        noun, space, rest = what.partition(" ")
        what = (f"{noun[:-3]}y" if noun.endswith("ies") else noun.removesuffix("s")) + space + rest
    return f"{number:,} {what}"


def one_line(error: object) -> str:
    """What an error says, without its line breaks; its type where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__


def first_few(values: Sequence[object], most: int = 3) -> str:
    """`"a, b, c and 4 more"`."""
    more = f" and {len(values) - most} more" if len(values) > most else ""
    return ", ".join(map(str, values[:most])) + more
