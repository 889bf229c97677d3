"""Classes are compared by their names, never by their number alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from fastvim.errors import UserError, first_few

MOST_NAMES = 20  # in a message


@dataclass(frozen=True)
class KnownClasses:
    """The classes that trained weights know.

    Attributes:
        source: the file, for messages.
        names: in the order of the outputs.
        ids: COCO's ids of the classes, in that order; empty where the weights have none.
    """

    source: str
    names: list[str]
    ids: list[int | str] = field(default_factory=list)


def places(own: Sequence[str], known: Sequence[str], where: str, of: str = "expected") -> list[int]:
    """The place of each class among the known ones, by name.

    Args:
        own: classes of some data.
        known: those that they are to be some of, in index order.
        where: the data, for messages.
        of: whose the known ones are, for messages: "of FILE".

    Raises:
        UserError: with both lists, for a class that is none of those known, or several of them.
    """
    if list(own) == list(known):
        return list(range(len(own)))
    index = {name: position for position, name in enumerate(known)}
    number = Counter(known)
    wrong = [name for name in own if number[name] != 1]
    if wrong:
        problem = "several" if wrong[0] in index else "none"
        raise UserError(
            f"{where}: class {wrong[0]!r} is {problem} of the {len(known)} classes {of}, "
            f"{first_few(known, MOST_NAMES)}; found {first_few(own, MOST_NAMES)}"
        )
    return [index[name] for name in own]


def check_different(names: Sequence[str], where: str) -> None:
    """Raise UserError for a name of two classes; `where` they are, for the message."""
    if repeated := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise UserError(f"{where}: two classes named {first_few(repeated)}; expected another name")
