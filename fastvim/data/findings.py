"""What is wrong with a set of files, counted by kind."""

from __future__ import annotations

from collections.abc import Sized
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol


class Finding(NamedTuple):
    """Something wrong, of one kind.

    Attributes:
        number: how often.
        first: where it was first, and what.
    """

    number: int
    first: str


class Findings(dict[str, Finding]):
    """What is wrong, by kind, in the order in which the kinds came up."""

    def add(self, kind: str, where: str) -> None:
        """Count one more of a kind, such as "unknown category"."""
        known = self.get(kind, Finding(0, where))
        self[kind] = known._replace(number=known.number + 1)

    def __str__(self) -> str:
        """All of it in one line."""
        return "; ".join(f"{n:,} x {kind} (first: {first})" for kind, (n, first) in self.items())


class Readable(Sized, Protocol):
    """A dataset that can be read without changing what it reads."""

    def read(self, index: int) -> object:
        """A sample as stored; `UnreadableImageError` where it cannot be used."""


@dataclass
class Examination:
    """What is known of a split before its images are read.

    Attributes:
        split: its name.
        errors: what keeps it from being used.
        dropped: what training leaves out.
        facts: counts that are no mistakes.
        files: what is left to be read.
    """

    split: str
    files: Readable
    errors: Findings = field(default_factory=Findings)
    dropped: Findings = field(default_factory=Findings)
    facts: dict[str, int] = field(default_factory=dict)
