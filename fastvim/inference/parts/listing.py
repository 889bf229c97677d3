"""The fixed list of a run: a JSON object a line, written once, read a part at a time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import IO

from fastvim.errors import UserError
from fastvim.inference.parts.store import Store
from fastvim.inference.parts.work import Item


@dataclass(frozen=True)
class Listing:
    """Where the items of each part are.

    Attributes:
        file: of the list.
        sha256: of that file.
        rows: number of items.
        offsets: first byte of each part, and the end of the file.
    """

    file: str
    sha256: str
    rows: int
    offsets: list[int]


def write_list(file: IO[bytes], items: Iterable[Item], part_size: int) -> Listing:
    """Write a list, and say what it is called: after its content.

    Args:
        file: that the list is written to.
        items: of the images, taken one by one.
        part_size: items of a part.

    Raises:
        UserError: there is no item.
    """
    digest, rows, end = hashlib.sha256(), 0, 0
    offsets: list[int] = []
    for item in items:
        if rows % part_size == 0:
            offsets.append(end)
        line = json.dumps(item).encode() + b"\n"  # ASCII, whatever bytes a path has
        file.write(line)
        digest.update(line)
        rows, end = rows + 1, end + len(line)
    if not rows:
        raise UserError("no image in the list")
    sha256 = digest.hexdigest()
    return Listing(f"list-{sha256[:16]}.jsonl", sha256, rows, [*offsets, end])


def read_items(store: Store, listing: Listing, part: int) -> list[Item]:
    """The items of a part."""
    start, end = listing.offsets[part : part + 2]
    return [json.loads(line) for line in store.read(listing.file, start, end).splitlines()]
