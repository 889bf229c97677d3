"""What all parts of a folder have in common, written once: the list, the weights, the settings."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import PIL
import torch

from fastvim import __version__
from fastvim.errors import UserError
from fastvim.inference.parts.listing import Listing, write_list
from fastvim.inference.parts.store import Store
from fastvim.inference.parts.work import Item

NAME = "manifest.json"
VERSION = 1  # of the format of manifests and parts
PART_SIZE = 1024  # rows: whole batches of any usual size
_SHOWN = 60  # letters of a value in a message


@dataclass(frozen=True)
class Manifest:
    """A run over a fixed list.

    Attributes:
        command: that computes the parts.
        weights: digest of the model's tensors.
        settings: all else that changes rows.
        source: of the list, for a cheap comparison: the words that were given, or a table's digest.
        format: of the parts, "parquet" or "jsonl".
        part_size: rows of all parts but the last.
        listing: where the items of each part are.
        versions: of the libraries of the first process, for the record.
    """

    command: str
    weights: str
    settings: dict[str, Any]
    source: dict[str, Any]
    format: str
    part_size: int
    listing: Listing
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def parts(self) -> int:
        """Number of parts."""
        return len(self.listing.offsets) - 1

    def size(self, part: int) -> int:
        """Rows of a part."""
        return min(self.part_size, self.listing.rows - part * self.part_size)

    def name(self, part: int) -> str:
        """The file of a part."""
        return f"part-{part:06d}.{self.format}"

    def done(self, store: Store) -> dict[int, float]:
        """The parts that exist, and when each was written."""
        times = store.times()
        names = ((part, self.name(part)) for part in range(self.parts))
        return {part: times[name] for part, name in names if name in times}


def read_manifest(store: Store) -> Manifest | None:
    """The manifest of a folder; None where there is none.

    Raises:
        UserError: one that is damaged, or of a later version; parts without a manifest.
    """
    names = store.times()
    path = store.path(NAME)
    if NAME not in names:
        if parts := sorted(name for name in names if name.startswith("part-")):
            raise UserError(f"{store.path(parts[0])}: a part without {path}; expected both")
        return None
    try:
        told = json.loads(store.read(NAME))
        version = told.pop("version")
        if version == VERSION:
            return Manifest(**{**told, "listing": Listing(**told["listing"])})
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path}: damaged; expected the manifest of a run") from error
    raise UserError(f"{path}: version {version}, expected {VERSION}: another release wrote it")


def agree(
    store: Store,
    command: str,
    weights: str,
    settings: dict[str, Any],
    source: dict[str, Any],
    items: Callable[[], Iterable[Item]],
    part_size: int | None,
) -> tuple[Manifest, bool]:
    """The manifest of a folder: the one that is there, or a new one; and whether it is new.

    The list is made once. A run goes on with the stored one where it was started with the same
    words or table; where all parts exist, a list of words is made again and compared.

    Args:
        store: of the parts.
        command, weights, settings, source: as of `Manifest`.
        items: makes the list.
        part_size: None for that of the stored manifest, else `PART_SIZE`.

    Raises:
        UserError: the parts in the folder are of something else; as `read_manifest`.
    """
    settings = json.loads(json.dumps(settings))
    listing: Listing | None = None
    store.tidy()
    stored = read_manifest(store)
    if new := stored is None:
        size = part_size or PART_SIZE
        with store.writing() as draft:
            listing = write_list(draft.file, items(), size)
            draft.name = listing.file
        told = Manifest(command, weights, settings, source, _form(), size, listing, _versions())
        text = json.dumps({"version": VERSION, **asdict(told)}, indent=1)
        store.write_first(NAME, text.encode())
        stored = read_manifest(store)  # perhaps of a process that was faster
    assert stored is not None
    _compare(store, "command", stored.command, command)
    _compare(store, "weights", stored.weights, weights)
    _compare(store, "settings:", stored.settings, settings)
    _compare(store, "--part-size", stored.part_size, part_size or stored.part_size)
    trusted = "table" in source or len(stored.done(store)) < stored.parts
    if listing is None and not (trusted and stored.source == source):
        with open(os.devnull, "wb") as nowhere:
            listing = write_list(nowhere, items(), stored.part_size)
    if listing is not None:
        _compare(store, "number of images", stored.listing.rows, listing.rows)
        _compare(store, "list of images", stored.listing.sha256, listing.sha256)
    return stored, new


def _compare(store: Store, what: str, stored: Any, given: Any) -> None:
    if isinstance(stored, dict) and isinstance(given, dict):
        for name in sorted({*stored, *given}):
            _compare(store, f"{what} {name}", stored.get(name), given.get(name))
    elif stored != given:
        raise UserError(
            f"{store.root}: parts of a run with other {what}: {_shown(stored)} there, "
            f"{_shown(given)} here; expected another --out, or to begin anew without that folder"
        )


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def _form() -> str:
    """Parquet where pyarrow is installed, else JSON lines."""
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError:
        return "jsonl"
    return "parquet"


def _versions() -> dict[str, str]:
    return {
        "fastvim": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "pillow": PIL.__version__,
    }
