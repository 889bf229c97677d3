"""The images that a run is given: names of files and folders, globs, addresses, or a long list."""

from __future__ import annotations

import glob
import heapq
import json
import logging
import os
import tempfile
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePath
from typing import Any

from fastvim.data.folders import (
    describe_endings,
    image_endings,
    is_ignored,
    natural_key,
    walk_images,
)
from fastvim.data.remote import filesystem, is_url, join, read_bytes, retried
from fastvim.errors import UserError
from fastvim.inference.parts.tables import table_paths
from fastvim.inference.parts.work import Item
from fastvim.storage import require_file
from fastvim.weights.fetch import digest

_logger = logging.getLogger(__name__)

RUN = 200_000  # paths that are sorted at once


@dataclass(frozen=True)
class Source:
    """Where the list of a run comes from.

    Args:
        words: files, folders with all below them, globs, and addresses of these.
        table: a list, see `table_paths`; its relative paths are below its folder. Instead of words.
    """

    words: tuple[str, ...] = ()
    table: str | None = None

    def identity(self) -> dict[str, Any]:
        """What tells this source from others without making the list."""
        if self.table is None:
            return {"words": list(self.words), "folder": os.getcwd()}
        with _local(self.table) as file:
            return {"table": digest(Path(file)), "folder": _folder(self.table)}

    def require_image(self, endings: Collection[str]) -> None:
        """Raise UserError where nothing looks like an image, before any weights are fetched."""
        if self.table is not None:
            return
        failures: list[Item] = []
        for word in self.words:
            path = os.path.expanduser(word)
            if os.path.isdir(path) and any(walk_images(path, endings, Counter())):
                return
            for item in _named(word, endings):
                if "error" not in item:
                    return
                failures.append(item)
        for item in failures:
            _logger.warning("skipped %s: %s", item["path"], item["error"])
        raise UserError(f"no image among {len(failures)} files could be read")

    def items(self, endings: Collection[str] | None, out: str | None = None) -> Iterator[Item]:
        """Each image as {"path": …}; what names no image as {"path": …, "error": …}.

        Words give every file once; a table gives a row for each of its rows.

        Args:
            endings: of the image files in folders, in small letters; None for what Pillow reads.
            out: folder of results, whose pictures are no images of a folder above it.

        Raises:
            UserError: as `table_paths`; a folder that cannot be listed.
        """
        if self.table is not None:
            folder = _folder(self.table)
            with _local(self.table) as file:
                for path in table_paths(file, self.table):
                    yield {"path": join(folder, path)}
            return
        seen: set[str] = set()
        for word in self.words:
            for item in _named(word, endings, out):
                if item["path"] in seen:
                    continue
                if len(self.words) > 1:
                    seen.add(item["path"])
                yield item


def _named(word: str, endings: Collection[str] | None, out: str | None = None) -> Iterator[Item]:
    """The images that one word names."""
    if is_url(word):
        yield from _at_address(word, endings)
        return
    path = os.fspath(Path(os.path.expanduser(word)))
    if os.path.isdir(path):
        yield from _below(path, endings, out)
    elif os.path.exists(path):
        yield {"path": path}
    else:
        files = sorted(glob.glob(path, recursive=True))
        if not files:
            yield {"path": path, "error": "no such file"}
        yield from ({"path": os.fspath(Path(file))} for file in files)


def _below(folder: str, endings: Collection[str] | None, out: str | None) -> Iterator[Item]:
    """The images below a folder in natural order, but those below `out`."""
    left_out: Counter[str] = Counter()
    mine = "" if out is None or is_url(out) else os.path.relpath(out, folder) + os.sep
    found = walk_images(folder, endings, left_out)
    images = (path for path in found if not (mine and path.startswith(mine)))
    empty = True
    for path in sorted_in_runs(images):
        empty = False
        yield {"path": os.path.join(folder, path)}
    if left_out:
        _logger.warning("%s: left out %s", folder, describe_endings(left_out))
    if empty:
        yield {"path": folder, "error": "a folder without images"}


def sorted_in_runs(paths: Iterable[str], size: int = RUN) -> Iterator[str]:
    """Paths in natural order, in the memory of `size` of them: sorted runs of more lie on disk."""
    remaining = iter(paths)
    with ExitStack() as files:
        runs: list[Iterator[str]] = []
        while run := sorted(islice(remaining, size), key=natural_key):
            if not runs and len(run) < size:
                yield from run
                return
            file = files.enter_context(tempfile.TemporaryFile("w+"))
            file.writelines(json.dumps(path) + "\n" for path in run)
            file.seek(0)
            runs.append(map(json.loads, file))
        yield from heapq.merge(*runs, key=natural_key)


def _at_address(url: str, endings: Collection[str] | None) -> Iterator[Item]:
    """A file at an address, the files that match a pattern, or all below a folder.

    A server that lists nothing, as of `https://`, has files alone.
    """
    known = image_endings() if endings is None else endings
    opened = filesystem(url, {})
    bare = opened._strip_protocol(url)

    def listed() -> list[str]:
        if "*" in bare:
            found = opened.glob(bare)
            return [name for name in found if not is_ignored(PurePath(name).name)]
        names = opened.find(bare) if opened.isdir(bare) else []
        below = ((name, name[len(bare) :].split("/")) for name in names)
        names = [name for name, parts in below if not any(map(is_ignored, parts))]
        return [name for name in names if PurePath(name).suffix.lower() in known]

    plain = "::" in url or url.startswith(("http://", "https://"))
    names = [] if plain else retried(listed, url)
    for name in sorted(names, key=natural_key):
        yield {"path": opened.unstrip_protocol(name)}
    if not names:
        yield {"path": url}


@contextmanager
def _local(table: str) -> Iterator[str]:
    """A table as a file of this machine; an address is fetched."""
    if not is_url(table):
        path = os.path.expanduser(table)
        require_file(path)
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "table")
        file.write_bytes(read_bytes(table))
        yield str(file)


def _folder(table: str) -> str:
    return table.rpartition("/")[0] if is_url(table) else os.path.dirname(table)
