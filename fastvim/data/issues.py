"""What is wrong with a set of files, counted by kind."""

from __future__ import annotations

from collections.abc import Sized
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol


class Issue(NamedTuple):
    """A kind of mistake.

    Attributes:
        number: how often it was found.
        first: where it was found first, and what exactly.
    """

    number: int
    first: str


class Issues(dict[str, Issue]):
    """What is wrong, by kind, in the order in which the kinds came up."""

    def add(self, kind: str, where: str) -> None:
        """Count one more of a kind, such as "unknown category"."""
        known = self.get(kind, Issue(0, where))
        self[kind] = known._replace(number=known.number + 1)

    def __str__(self) -> str:
        """All of them in one line."""
        return "; ".join(f"{n:,} x {kind} (first: {first})" for kind, (n, first) in self.items())


class Readable(Sized, Protocol):
    """A dataset whose samples can be read as they are stored."""

    def read(self, index: int) -> object:
        """A sample as stored; `UnreadableImageError` where it cannot be used."""


@dataclass
class SplitReport:
    """What is known of a split before its images are read.

    Attributes:
        split: its name.
        files: the samples that are left to be read.
        errors: what a run would stop at.
        dropped: what training leaves out.
        facts: counts that are no mistakes.
    """

    split: str
    files: Readable
    errors: Issues = field(default_factory=Issues)
    dropped: Issues = field(default_factory=Issues)
    facts: dict[str, int] = field(default_factory=dict)
