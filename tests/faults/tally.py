"""Counts of faults: how many were tried, and what they cost."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

HEADER = ("fault", "tried", "survived", "lost", "seeds")


class Tally:
    """Counts each fault; `tests/conftest.py` prints all tests' counts as one table.

    A fault is survived if nothing was lost: what was written before is there, damage is named, and
    the command run again gives what it gives without a fault.
    """

    def __init__(self) -> None:
        self.rows: list[list[str]] = []
        self.lost: list[str] = []

    def count(self, fault: str, seed: int, problems: list[str]) -> None:
        """Count a fault of this seed; `problems` say what was lost."""
        self.rows.append([fault, "lost" if problems else "survived", str(seed)])
        if problems:
            self.lost.append(f"seed {seed}, {fault}: {'; '.join(problems)}")

    def record(self, record_property) -> None:
        """Give the counts to the report of the test, and fail where something was lost."""
        record_property("faults", self.rows)
        assert not self.lost, "\n".join(self.lost)


def table(rows: Iterable[Iterable[str]]) -> list[str]:
    """Lines of a table of all counts."""
    total: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for name, outcome, seed in rows:
        total[name].append((outcome == "survived", int(seed)))
    total["all"] = [each for found in total.values() for each in found]
    lines = [HEADER]
    for name, found in total.items():
        survived, seeds = sum(kept for kept, _ in found), [seed for _, seed in found]
        numbers = len(found), survived, len(found) - survived
        lines.append((name, *map(str, numbers), f"{min(seeds)} to {max(seeds)}"))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join([first.ljust(widths[0]), *map(str.rjust, rest, widths[1:])])
        for first, *rest in lines
    ]
