"""What is wrong with a set of files, counted by kind."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sized
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from fastvim.data.parallel import read_in_order
from fastvim.data.pixels import MISSING_IMAGE, UnreadableImageError


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
    """What is known of a split.

    Attributes:
        split: its name.
        files: the samples that are left to be read.
        errors: what a run would stop at; at first, what the lists of files tell.
        dropped: what training leaves out.
        warnings: what looks odd; a run goes on, and says it once.
        facts: counts that are not mistakes.
        classes: what each class has, by its name, in the order of the labels.
        counted: what `classes` counts: "images", "objects" or "pixels".
        sizes: images of each width and height.
        modes: images of each mode, as their files store them.
    """

    split: str
    files: Readable
    errors: Issues = field(default_factory=Issues)
    dropped: Issues = field(default_factory=Issues)
    warnings: Issues = field(default_factory=Issues)
    facts: dict[str, int] = field(default_factory=dict)
    classes: dict[str, int] = field(default_factory=dict)
    counted: str = "images"
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    modes: Counter[str] = field(default_factory=Counter)

    def read(self, workers: int) -> Iterator[UnreadableImageError | None]:
        """Why each sample cannot be used, in order; None where it can, or its file is missing.

        Missing files are in `errors` from the beginning.

        Args:
            workers: samples read at a time.
        """

        def read(index: int) -> None:
            self.files.read(index)  # the sample is not kept

        for error in read_in_order(read, range(len(self.files)), workers, UnreadableImageError):
            yield None if error is None or error.kind == MISSING_IMAGE else error

    def __str__(self) -> str:
        """A line of facts, then a line for each kind of mistake and of what looks odd."""
        facts = ", ".join(f"{number:,} {what}" for what, number in self.facts.items())
        lines = [f"{self.split}: {facts}"]
        for kind, (number, first) in self.errors.items():
            lines.append(f"  {number:,} x {kind}, first: {first}")
        for kind, (number, first) in self.dropped.items():
            lines.append(f"  {number:,} x {kind}, left out in training, first: {first}")
        for kind, (number, first) in self.warnings.items():
            lines.append(f"  {number:,} x {kind}, first: {first}")
        return "\n".join(lines)
