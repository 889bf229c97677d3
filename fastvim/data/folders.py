"""Image files in folders and tar files: which are images, and of which class.

One rule for all commands: hidden files and folders and those that systems leave behind (`IGNORED`)
do not count, every ending that Pillow reads does, in any case of letters and in subfolders too. The
other files are counted by their endings.
"""

from __future__ import annotations

import logging
import os
import re
import tarfile
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import IO, BinaryIO, Literal, NamedTuple

import numpy as np
from PIL import Image

from fastvim.data.issues import Issues
from fastvim.errors import UserError, first_few
from fastvim.storage import require_file

_logger = logging.getLogger(__name__)

ClassFolder = Literal["outer", "inner"]

# Names of a split's folder, the usual one first.
SPLIT_NAMES = {
    "train": ("train", "training"),
    "val": ("val", "validation", "valid", "eval", "evaluation"),
}
# What macOS, Windows and network storage leave between the files, in small letters.
IGNORED = {
    *("__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini"),
    *("$recycle.bin", "system volume information", "@eadir", "lost+found"),
}
# Pillow recognises these and decodes none of them without another program.
_NOT_DECODED = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "PDF", "PALM", "WMF"}
_DIGITS = re.compile(r"(\d+)")
_NO_ENDING = "without ending"


@cache
def image_endings() -> frozenset[str]:
    """The endings of the files that Pillow reads, as ".jpg", in small letters."""
    formats = Image.registered_extensions().items()
    return frozenset(ending.lower() for ending, name in formats if name not in _NOT_DECODED)


def is_ignored(name: str) -> bool:
    """Whether a file or folder of this name does not count at all."""
    return name.startswith(".") or name.lower() in IGNORED


def natural_key(text: str) -> tuple[list[str | int], str]:
    """Sorts numbers in names by value, as a2 before a10; equal ones by their letters' case."""
    parts: list[str | int] = list(_DIGITS.split(text.lower()))
    parts[1::2] = map(int, parts[1::2])
    return parts, text


class Listing(NamedTuple):
    """The image files below a folder, in natural order, and what is not one.

    Attributes:
        paths: relative to the folder.
        left_out: other files, counted by their endings.
        folders: the folders right below it.
    """

    paths: list[str]
    left_out: Counter[str]
    folders: list[str]


def list_images(folder: str | os.PathLike[str], endings: Iterable[str] | None = None) -> Listing:
    """The image files below a folder.

    Args:
        folder: that is searched, with all below it. Links are followed.
        endings: of image files, in small letters; None for what Pillow reads.

    Raises:
        UserError: a folder that cannot be read.
    """
    top = os.fspath(folder)
    known = image_endings() if endings is None else frozenset(endings)
    paths: list[str] = []
    left_out: Counter[str] = Counter()
    folders = []
    for path, is_folder in _walk(top, ""):
        if is_folder:
            if os.sep not in path:
                folders.append(path)
            continue
        if _is_image(path, known, left_out):
            paths.append(path)
    return Listing(sorted(paths, key=natural_key), left_out, folders)


def walk_images(
    folder: str | os.PathLike[str], endings: Iterable[str] | None, left_out: Counter[str]
) -> Iterator[str]:
    """The image files below a folder as they are found, in no order, relative to it.

    Args:
        folder: as of `list_images`.
        endings: likewise.
        left_out: counts the endings of the other files.
    """
    known = image_endings() if endings is None else frozenset(endings)
    for path, is_folder in _walk(os.fspath(folder), ""):
        if not is_folder and _is_image(path, known, left_out):
            yield path


def _is_image(path: str, endings: Collection[str], left_out: Counter[str]) -> bool:
    ending = os.path.splitext(path)[1].lower()
    if ending not in endings:
        left_out[ending or _NO_ENDING] += 1
    return ending in endings


def _walk(top: str, below: str) -> Iterator[tuple[str, bool]]:
    """What lies below a folder, relative to `top`, and whether it is a folder."""
    folder = os.path.join(top, below)
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if is_ignored(entry.name):
                    continue
                path = os.path.join(below, entry.name)
                if not entry.is_dir():
                    yield path, False
                elif not (entry.is_symlink() and _leads_up(entry.path, folder)):
                    yield path, True
                    yield from _walk(top, path)
    except OSError as error:
        raise UserError(f"{folder}: cannot be listed ({error.strerror})") from error


def _leads_up(link: str, folder: str) -> bool:
    """Whether a link in a folder leads to that folder or to one above it: a circle."""
    target = os.path.realpath(link)
    return os.path.commonpath([target, os.path.realpath(folder)]) == target


def describe_endings(left_out: Counter[str]) -> str:
    """`"3 .txt, 1 without ending"`, the most frequent first."""
    ordered = sorted(left_out.items(), key=lambda item: (-item[1], item[0]))
    return first_few([f"{number:,} {ending}" for ending, number in ordered], 8)


class ClassFolders:
    """The images of a split: `SPLIT/CLASS/**`, or the same in a tar file.

    In a tar file, a tar file is a folder of its name, and a leading folder named after the split,
    as in `train.tar` of `train/CLASS/*`, does not count.

    Args:
        location: the folder or the tar file.
        class_folder: "outer": the class is the first folder below the split; "inner": the folder
            that holds the image.

    Attributes:
        class_to_idx: index of each class that has images, in natural order.
        targets: class index of each image; -1 outside class folders.
        left_out: files that are no images, counted by their endings.
        empty: class folders without an image.

    Raises:
        UserError: no images; a file that is not a tar file, a folder that cannot be read.
    """

    def __init__(self, location: Path, class_folder: ClassFolder = "outer") -> None:
        if class_folder not in ("outer", "inner"):
            raise UserError(f"class_folder {class_folder!r}: expected 'outer' or 'inner'")
        self.root = location
        paths, inside, folders = self._list()
        names = [_class_of(path, class_folder) for path in inside]
        classes = sorted({*names} - {""}, key=natural_key)
        self.class_to_idx = {name: index for index, name in enumerate(classes)}
        self.targets = np.array([self.class_to_idx.get(name, -1) for name in names])
        # Bytes, not str: reference counts of many objects would copy the pages into every worker.
        self._paths = np.array([os.fsencode(path) for path in paths])
        self._above = len(paths[0]) - len(inside[0])
        tops = {path.partition(os.sep)[0] for path in paths}
        self.empty = sorted({*folders} - tops, key=natural_key)

    def _list(self) -> tuple[list[str], list[str], list[str]]:
        """The paths of the images, the same below the split, and the folders right below it."""
        location = self.root
        self._places: np.ndarray | None = None  # (n, 2): first byte and length, in a tar file
        if location.is_dir():
            paths, self.left_out, folders = list_images(location)
            inside = paths
        else:
            members, self.left_out = _list_tar(location)
            paths = sorted(members, key=natural_key)
            self._places = np.array([members[path] for path in paths], dtype=np.int64)
            inside = _without_split(paths, location.stem)
            folders = []
        if not paths:
            left = f"; it has {describe_endings(self.left_out)}" if self.left_out else ""
            raise UserError(
                f"{location}: no images; expected {location}/CLASS/*.jpg, .png or others that "
                f"Pillow reads{left}"
            )
        return paths, inside, folders

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> tuple[BinaryIO, int]:
        """An open file, and the index of its class."""
        target = int(self.targets[index])
        if self._places is None:
            path = self.source(index)
            require_file(path)
            return open(path, "rb"), target
        start, length = self._places[index].tolist()
        with open(self.root, "rb") as archive:
            archive.seek(start)
            return BytesIO(archive.read(length)), target

    def filename(self, index: int) -> str:
        """The path of an image below the split, or in the tar file."""
        return os.fsdecode(self._paths[index])

    def below(self, index: int) -> str:
        """The path of an image below the split, in a tar file too."""
        return self.filename(index)[self._above :]

    def source(self, index: int) -> str:
        """The file on the disk that an image is read from."""
        in_tar = self._places is not None
        return str(self.root) if in_tar else os.path.join(self.root, self.filename(index))

    @property
    def outside(self) -> str:
        """What is wrong with images outside class folders, in words; "" without such images."""
        wrong = np.flatnonzero(self.targets < 0)
        if not len(wrong):
            return ""
        return (
            f"{self.root}: {len(wrong):,} of {len(self):,} images outside class folders, such as "
            f"{self.filename(wrong[0])}; expected {self.root}/CLASS/*"
        )

    @property
    def unused(self) -> Issues:
        """What does not count as an image or a class."""
        found = Issues()
        if self.left_out:
            where = f"{self.root}: {describe_endings(self.left_out)}"
            found.add("file that is no image", where, sum(self.left_out.values()))
        if self.empty:
            where = f"{self.root}: {first_few(self.empty, 10)}"
            found.add("class folder without an image", where, len(self.empty))
        return found


def _class_of(path: str, class_folder: ClassFolder) -> str:
    *folders, _ = path.split(os.sep)
    if not folders:
        return ""
    return folders[0] if class_folder == "outer" else folders[-1]


def _list_tar(file: Path) -> tuple[dict[str, tuple[int, int]], Counter[str]]:
    """The images of a tar file: path, first byte and length; and a count of the other files."""
    found: dict[str, tuple[int, int]] = {}
    left_out: Counter[str] = Counter()
    require_file(file)
    try:
        with open(file, "rb") as stream:
            _scan_tar(file, stream, "", 0, found, left_out)
    except (OSError, tarfile.TarError) as error:
        raise UserError(f"{file}: no images: not a tar file, or damaged ({error})") from error
    return found, left_out


def _scan_tar(
    file: Path,
    stream: IO[bytes],
    folder: str,
    start: int,
    found: dict[str, tuple[int, int]],
    left_out: Counter[str],
) -> None:
    """Add what a tar file holds.

    Args:
        file: the outermost one, for messages.
        stream: the tar file.
        folder: that its paths are in: the name of a tar file inside another one.
        start: of the stream in the outermost file, in bytes.
        found: of `_list_tar`.
        left_out: of `_list_tar`.
    """
    with tarfile.open(fileobj=stream, mode="r:") as archive:
        while (member := archive.next()) is not None:
            # Of millions of files they would fill the memory.
            archive.members.clear()  # type: ignore[attr-defined]
            parts = [part for part in member.name.split("/") if part not in ("", ".")]
            if member.isdir() or any(map(is_ignored, parts)):
                continue
            path = "/".join([folder, *parts] if folder else parts)
            stem, ending = os.path.splitext(path)
            ending = ending.lower()
            place = start + member.offset_data
            inner = archive.extractfile(member) if member.isreg() else None
            if inner is None:
                left_out["links"] += 1
            elif ending == ".tar":
                _scan_tar(file, inner, stem, place, found, left_out)
            elif ending in image_endings():
                found[path] = place, member.size
            else:
                left_out[ending or _NO_ENDING] += 1
        _check_end(f"{file}: {folder}.tar in it" if folder else str(file), stream, archive.offset)


def _check_end(name: str, stream: IO[bytes], end: int) -> None:
    """Look at what follows the last member of a tar file: `tarfile` takes anything for the end.

    Args:
        name: of the tar file, for messages.
        stream: the tar file.
        end: of its last member, in bytes.

    Raises:
        tarfile.ReadError: what follows is a member that is cut off or damaged.
    """
    stream.seek(end)
    rest = stream.read(1 << 20)
    if rest[: tarfile.BLOCKSIZE].strip(b"\0"):
        raise tarfile.ReadError(f"no member begins at byte {end:,}")
    if len(rest) < tarfile.BLOCKSIZE:
        _logger.warning("%s lacks its end marker: files at its end may be cut off", name)
    elif rest.strip(b"\0"):
        _logger.warning("%s goes on after its end marker: what follows is not read", name)


def _without_split(paths: list[str], name: str) -> list[str]:
    """The paths below the folder of the split, where all of them are in one of its names."""
    shared = os.path.commonpath([os.path.dirname(path) for path in paths]).split("/")
    aliases = {name, *next((names for names in SPLIT_NAMES.values() if name in names), ())}
    depth = next((i for i, part in enumerate(shared, 1) if part in aliases), 0)
    return [path.split("/", depth)[-1] for path in paths]
