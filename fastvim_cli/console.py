"""What commands print: plain text, with the base install alone."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import TypeVar

_Item = TypeVar("_Item")


def note(text: str) -> None:
    """Print to standard error, which is not the command's result."""
    print(text, file=sys.stderr, flush=True)


def table(
    header: Sequence[str], rows: Iterable[Sequence[str]], left: Collection[str] | None = None
) -> str:
    """Columns of text under their names.

    Args:
        header: a name for each column.
        rows: a cell for each column.
        left: the columns that are aligned to the left; None for the first one.
    """
    lines = [header, *rows]
    left = header[:1] if left is None else left
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if name in left else cell.rjust(width)
            for cell, width, name in zip(line, widths, header, strict=True)
        ).rstrip()
        for line in lines
    )


def track(items: Iterable[_Item], doing: str, total: int) -> Iterator[_Item]:
    """The items; a terminal shows how many of them are done."""
    terminal = sys.stderr.isatty()
    try:
        for done, item in enumerate(items):
            if terminal:
                sys.stderr.write(f"\r{doing} {done}/{total}")
                sys.stderr.flush()
            yield item
    finally:
        if terminal:
            sys.stderr.write("\r\x1b[K")  # erases the line
            sys.stderr.flush()
