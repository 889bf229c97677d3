"""A packed set of images: class folders in few large files.

`fastvim_pack.json` (`INDEX`) in a folder makes it a pack. It names for each split a list of its
images, `SPLIT.npz`, and the parts that hold their bytes, `SPLIT-00000.tar` and so on: tar files,
which any other program unpacks into the folders that they were made from. The list has the path of
each image below its split, and where it lies. `fastvim.data.packing` writes all of it.

n: number of images of a split
"""

from __future__ import annotations

import json
import mmap
import os
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from fastvim.data.folders import ClassFolders
from fastvim.data.pixels import UnreadableImageError
from fastvim.errors import UserError
from fastvim.storage import problem, require_file

INDEX = "fastvim_pack.json"
UNFINISHED = f"{INDEX}.part"  # is there while images are packed, and after a kill
FORMAT = 1
CHANGED = "image that changed after it was packed"
# What reading a damaged index or list raises.
_DAMAGE = (ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error)
_WILL_NEED = getattr(mmap, "MADV_WILLNEED", None)  # Windows has none
_AGAIN = "pack the images again (fastvim data pack)"


class PackedSplit(NamedTuple):
    """A split in the index.

    Attributes:
        images: their number.
        listed_in: name of a file.
        parts: name and length in bytes of each file that holds them.
    """

    images: int
    listed_in: str
    parts: list[tuple[str, int]]


def packed_splits(root: str | os.PathLike[str]) -> dict[str, PackedSplit] | None:
    """The splits of a packed set by their names; None for a folder that is none.

    Raises:
        UserError: the index cannot be read, is damaged, not finished or of another version.
    """
    path = Path(root, INDEX)
    require_file(path)
    try:
        told = json.loads(path.read_text("utf-8"))
        if told["format"] != FORMAT:
            raise UserError(
                f"{path}: a pack of format {told['format']}; this version reads {FORMAT}"
            )
        return {
            name: PackedSplit(split["images"], split["listed_in"], list(map(tuple, split["parts"])))
            for name, split in told["splits"].items()
        }
    except (FileNotFoundError, NotADirectoryError):
        if path.with_name(UNFINISHED).exists():
            raise UserError(f"{root}: images that are not packed to the end; {_AGAIN}") from None
        return None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({problem(error)})") from error
    except UserError:
        raise
    except (*_DAMAGE, AttributeError) as error:
        raise UserError(f"{path}: damaged ({error}); {_AGAIN}") from error


class PackedFolders(ClassFolders):
    """The images of a split of a packed set; the rest is as of the folders that it was made from.

    A part is mapped into memory by the process that reads it, when it first does.

    Args:
        location: `ROOT/SPLIT`, where the split would be as a folder.
        class_folder: as of `ClassFolders`.

    Raises:
        UserError: a file of the pack is missing, or not as it was written.
    """

    _entries: np.ndarray  # (n, 4): part, first byte, length, CRC-32

    def _list(self) -> tuple[list[str], list[str], list[str]]:
        packed = packed_splits(self.root.parent) or {}
        split = packed[self.root.name]
        self._parts = split.parts
        self._maps: dict[int, mmap.mmap] = {}
        for name, length in split.parts:
            path = self.root.with_name(name)
            try:
                _require_length(path, path.stat().st_size, length)
            except OSError as error:
                raise UserError(f"{path}: cannot be read ({problem(error)}); {_AGAIN}") from error
        file = self.root.with_name(split.listed_in)
        try:
            with np.load(file) as lists:
                paths = [os.fsdecode(path) for path in lists["paths"].tolist()]
                self._entries = lists["entries"]
            if not len(paths) == len(self._entries) == split.images > 0:
                raise ValueError(f"{len(paths):,} images, expected {split.images:,}")
        except OSError as error:
            raise UserError(f"{file}: cannot be read ({problem(error)}); {_AGAIN}") from error
        except _DAMAGE as error:
            raise UserError(f"{file}: damaged ({error}); {_AGAIN}") from error
        self.left_out = Counter()  # said when the images were packed
        return paths, paths, []

    def __getitem__(self, index: int) -> tuple[BinaryIO, int]:
        return BytesIO(self._bytes(index)), int(self.targets[index])

    def source(self, index: int) -> str:
        return str(self.root.with_name(self._parts[self._entries[index, 0]][0]))

    def verify(self, index: int) -> None:
        """Raise UnreadableImageError where the bytes of an image are not those that were packed."""
        if zlib.crc32(self._bytes(index)) != self._entries[index, 3]:
            name, part = os.path.join(self.root, self.filename(index)), self.source(index)
            raise UnreadableImageError(f"{name}: changed in {part} since; {_AGAIN}", CHANGED)

    def read_ahead(self, indices: Iterable[int]) -> None:
        """Let the system read some images from the disk, all at once, while the caller goes on."""
        with suppress(OSError, UserError):  # reading them says what is wrong
            for index in indices:
                self._place(index)

    def _bytes(self, index: int) -> bytes:
        mapped, start, end = self._place(index)
        return mapped[start:end]

    def _place(self, index: int) -> tuple[mmap.mmap, int, int]:
        """Where an image is; the system is told that it will be read, whole, not page by page."""
        part, start, length, _ = self._entries[index].tolist()
        mapped = self._maps.get(part)
        if mapped is None:
            mapped = self._maps.setdefault(part, self._map(part))
        if _WILL_NEED is not None:
            first = start - start % mmap.PAGESIZE
            mapped.madvise(_WILL_NEED, first, start + length - first)
        return mapped, start, start + length

    def _map(self, part: int) -> mmap.mmap:
        name, length = self._parts[part]
        path = self.root.with_name(name)
        with open(path, "rb") as file:
            # Once more: to read beyond the end of a file that was cut off since would kill.
            _require_length(path, os.fstat(file.fileno()).st_size, length)
            return mmap.mmap(file.fileno(), length, access=mmap.ACCESS_READ)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}


def _require_length(path: Path, length: int, expected: int) -> None:
    if length != expected:
        raise UserError(f"{path}: {length:,} bytes, expected {expected:,} as packed; {_AGAIN}")
