"""What commands print: plain text, with the base install alone."""

from __future__ import annotations

import logging
import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import TypeVar

_Item = TypeVar("_Item")


def printable(text: str) -> str:
    """A text whose characters all show: names may hold what a terminal acts upon.

    Line ends, escape sequences, marks of direction and bytes that are no text become escapes as
    Python writes them: `\\n`, `\\x1b`, `\\u202e`, `\\udcff`.
    """
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in text)


def say(*lines: str) -> None:
    """Print lines of the command's result."""
    for line in lines:
        print(printable(line))


def note(line: str) -> None:
    """Print a line to standard error, which is not the command's result."""
    print(printable(line), file=sys.stderr, flush=True)


class _Printable(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return "\n".join(map(printable, super().format(record).split("\n")))


def escape_logs() -> None:
    """Print the warnings of the library, which name files and classes, as `printable`."""
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(_Printable())


def table(
    header: Sequence[str], rows: Iterable[Sequence[str]], left: Collection[str] | None = None
) -> str:
    """Columns of text under their names, each cell `printable`.

    Args:
        header: a name for each column.
        rows: a cell for each column.
        left: the columns that are aligned to the left; None for the first one.
    """
    left = header[:1] if left is None else left
    lines = [tuple(map(printable, line)) for line in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if name in left else cell.rjust(width)
            for cell, width, name in zip(line, widths, header, strict=True)
        ).rstrip()
        for line in lines
    )


def overwrite(line: str) -> None:
    """Show a line in the place of the last one, on a terminal; an empty one takes it away."""
    sys.stderr.write(f"\r{line}\x1b[K")  # erases the rest of the line
    sys.stderr.flush()


def track(items: Iterable[_Item], doing: str, total: int) -> Iterator[_Item]:
    """The items; a terminal shows how many of them are done."""
    terminal = sys.stderr.isatty()
    try:
        for done, item in enumerate(items):
            if terminal:
                overwrite(f"{doing} {done}/{total}")
            yield item
    finally:
        if terminal:
            overwrite("")
