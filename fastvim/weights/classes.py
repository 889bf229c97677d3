"""The classes that weights know."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def known_classes(metadata: Mapping[str, Any]) -> tuple[list[str], list[int | str]]:
    """The names of a model's outputs in the data that it was trained on, and COCO's ids of them.

    Both are empty where nothing tells them. Published weights but COCO's tell none: their names are
    for people to read, and the published data have others.

    Args:
        metadata: of weights.
    """
    names, ids = metadata.get("class_names") or [], metadata.get("category_ids") or []
    if "published" in metadata and not ids:
        return [], []
    return list(names), list(ids)


def same_classes(own: Sequence[str], known: Sequence[str]) -> bool:
    """Whether two lists name the same outputs; numbers stand for any names."""
    if len(own) != len(known):
        return False
    numbers = [str(number) for number in range(len(own))]
    return list(own) == list(known) or numbers in (list(own), list(known))
