"""Packing class folders into few large files (`fastvim.data.packed`), whole or not at all."""

from __future__ import annotations

import json
import os
import re
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from fastvim import __version__
from fastvim.data.folders import ClassFolders, is_ignored
from fastvim.data.issues import Issues
from fastvim.data.packed import FORMAT, INDEX, UNFINISHED, PackedSplit
from fastvim.data.parallel import read_in_order
from fastvim.data.pixels import PictureReader, UnreadableImageError, stored
from fastvim.data.remote import is_url
from fastvim.data.splits import find_split, open_folder
from fastvim.errors import UserError, first_few
from fastvim.options import COUNT, check_given
from fastvim.storage import problem, remove_parts, written

SPLITS = ("train", "val", "test")
QUALITY = 90  # of smaller JPEG files
PART = 1 << 30  # bytes, about, of each of the first parts
_MANY = 64  # parts; the next ones are larger, as a process has each of them open
_OURS = re.compile(r".+-\d{5}\.tar(\.part)?|.+\.npz(\.part)?")


class Content(NamedTuple):
    """What is stored of an image.

    Attributes:
        data: bytes of a file.
        as_is: why it was not made smaller; "" where it was, or nobody asked.
        where: its name, with more where it cannot be read.
    """

    data: bytes
    as_is: str = ""
    where: str = ""


class Packed(NamedTuple):
    """What became of a split.

    Attributes:
        split: its name.
        images: their number.
        parts: number of files.
        size: of these files, in bytes.
        as_is: what was stored as it is although smaller images were asked for.
        left_out: files that are no images, and the like.
    """

    split: str
    images: int
    parts: int
    size: int
    as_is: Issues
    left_out: Issues


Contents = Iterable[Content | UserError]
Watch = Callable[[Contents, str, int], Iterator[Content | UserError]]


def _unwatched(contents: Contents, doing: str, total: int) -> Iterator[Content | UserError]:
    return iter(contents)


def pack(
    root: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    splits: Sequence[str] | None = None,
    size: int | None = None,
    workers: int = 4,
    watch: Watch = _unwatched,
) -> list[Packed]:
    """Pack the images of class folders; `ImageData(out)` then reads what `ImageData(root)` reads.

    Files are copied byte for byte, damaged ones too. With `size` an image whose shorter side is
    longer becomes a JPEG file of that size: upright, of 8 bits, resized by an antialiased bicubic
    filter, of quality 90. It keeps its name. What is no larger, has more than 8 bits or cannot be
    read stays as it is, and is counted.

    The images of `out` are there when all of them are. After an error nothing is left of it; what
    a kill has left is written anew by the next call.

    Args:
        root: folder of the splits, as `ImageData` takes it: folders, tar files, or a pack.
        out: folder of the pack, new or empty.
        splits: their names; None for those of "train", "val" and "test" that are there.
        size: shorter side in pixels of the stored images; None for the files as they are.
        workers: files read at a time.
        watch: shows the progress; it is given what is stored, what is done in words, and how many
            images there are.

    Returns:
        What became of each split.

    Raises:
        UserError: no such split or no images, a file that cannot be read, `out` is in use.
        MachineError: the disk is full, or the like.
    """
    check_given(COUNT, size=size)
    source, target = os.path.expanduser(root), Path(os.path.expanduser(out))
    for place in (source, os.fspath(out)):
        if is_url(place):
            raise UserError(f"{place}: an address; expected a folder on a disk")
    chosen = [each for each in SPLITS if find_split(source, each)] if splits is None else splits
    if not chosen and Path(source).is_dir():
        raise UserError(
            f"{source}: no split train, val or test; expected {source}/train/CLASS/*.jpg (what has "
            "masks, boxes or a table is not packed)"
        )
    found = {split: open_folder(source, split) for split in chosen or SPLITS}
    done, told = [], {}
    with _fresh(target), written(target / INDEX) as index:
        for images in {folders.root: folders for folders in found.values()}.values():
            packed, split = _pack_split(images, target, size, workers, watch)
            done.append(packed)
            told[packed.split] = split._asdict()
        made = {"format": FORMAT, "fastvim": __version__, "size": size, "splits": told}
        index.write(json.dumps(made, indent=1).encode())
    return done


def not_packed(root: str | os.PathLike[str], packed: Sequence[Packed]) -> str:
    """What else of a folder could be splits, in words; "" for nothing."""
    names = {split.split for split in packed}
    others = []
    for path in sorted(Path(os.path.expanduser(root)).iterdir()):
        name = path.name if path.is_dir() else path.name.removesuffix(".tar")
        could_be = path.is_dir() or path.suffix == ".tar"
        if could_be and name not in names and not is_ignored(path.name):
            others.append(path.name)
    return first_few(others)


def _pack_split(
    images: ClassFolders, target: Path, size: int | None, workers: int, watch: Watch
) -> tuple[Packed, PackedSplit]:
    name = images.root.stem if images.root.is_file() else images.root.name
    read = partial(_content, images, size)
    contents = read_in_order(read, range(len(images)), workers, UserError)
    as_is = Issues()
    entries = np.empty((len(images), 4), np.int64)

    def stored_contents() -> Iterator[tuple[str, bytes]]:
        for index, content in enumerate(watch(contents, f"packing {name}", len(images))):
            if isinstance(content, UserError):
                raise content
            if content.as_is:
                as_is.add(content.as_is, content.where)
            yield f"{name}/{images.below(index)}", content.data

    parts = _write_parts(target, name, stored_contents(), entries)
    paths = np.array([os.fsencode(images.below(index)) for index in range(len(images))])
    with written(target / f"{name}.npz") as file:
        np.savez(file, paths=paths, entries=entries)
    total = sum(length for _, length in parts)
    packed = Packed(name, len(images), len(parts), total, as_is, images.unused)
    return packed, PackedSplit(len(images), f"{name}.npz", parts)


def _content(images: ClassFolders, size: int | None, index: int) -> Content:
    name = os.path.join(images.root, images.filename(index))
    try:
        file, _ = images[index]
        with file:
            data = file.read()
    except OSError as error:
        raise UserError(f"{name}: cannot be read ({problem(error)})") from error
    return Content(data) if size is None else _made_smaller(data, name, size)


def _made_smaller(data: bytes, name: str, size: int) -> Content:
    try:
        image = PictureReader()(BytesIO(data), name)
    except UnreadableImageError as error:
        return Content(data, error.kind, str(error))
    if stored(image).highest is not None:
        return Content(data, "image of more than 8 bits", name)
    if (shorter := min(image.size)) <= size:
        return Content(data, "image that is no larger", name)
    if stored(image).mode in ("1", "L"):
        image = image.convert("L")
    width, height = (round(side * size / shorter) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    stream = BytesIO()
    image.save(stream, "JPEG", quality=QUALITY)
    return Content(stream.getvalue())


def _write_parts(
    target: Path, split: str, contents: Iterator[tuple[str, bytes]], entries: np.ndarray
) -> list[tuple[str, int]]:
    """Write the images into tar files; `entries` (n, 4) become what `PackedFolders` reads.

    Returns:
        Name and length of each file.
    """
    parts: list[tuple[str, int]] = []
    row, content = 0, next(contents, None)
    while content is not None:
        part = f"{split}-{len(parts):05d}.tar"
        limit = PART * (1 + len(parts) // _MANY)
        with (
            written(target / part) as file,
            tarfile.open(
                fileobj=file, mode="w", format=tarfile.GNU_FORMAT, encoding="utf-8"
            ) as archive,
        ):
            while content is not None and archive.offset < limit:
                name, data = content
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, BytesIO(data))
                archive.members.clear()  # type: ignore[attr-defined]
                start = archive.offset + (-len(data) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                entries[row] = len(parts), start, len(data), zlib.crc32(data)
                row, content = row + 1, next(contents, None)
        parts.append((part, (target / part).stat().st_size))
    return parts


@contextmanager
def _fresh(target: Path) -> Iterator[None]:
    """A folder for a pack, which nobody else writes; what an error leaves there is removed."""
    new = not target.exists()
    if not new:
        _clear(target)
    try:
        yield
    except BaseException:
        with suppress(OSError):
            (target / INDEX).unlink(missing_ok=True)
            _remove_ours(target)
            if new:
                target.rmdir()
        raise


def _clear(target: Path) -> None:
    """Remove what a killed call has left in a folder.

    Raises:
        UserError: something else is there, or another process is packing.
    """
    if not target.is_dir():
        raise UserError(f"{target}: it is there, and is not a folder")
    mark = target / UNFINISHED
    unfinished = mark.exists()
    remove_parts([mark])
    if mark.exists():
        raise UserError(f"{target}: another process packs there; wait for its end")
    if unfinished:
        _remove_ours(target)
    if (target / INDEX).exists():
        raise UserError(f"{target}: there is a pack already; delete it, or give another folder")
    if others := sorted(path.name for path in target.iterdir()):
        raise UserError(f"{target}: has {first_few(others)}; expected a new or empty folder")


def _remove_ours(target: Path) -> None:
    for path in target.iterdir():
        if _OURS.fullmatch(path.name):
            path.unlink()
