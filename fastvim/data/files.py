"""Image files of one split: folders and tar files, classes, damaged files."""

from __future__ import annotations

import logging
import os
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.data import ImageDataset, create_dataset, get_img_extensions
from timm.data.readers.reader_image_in_tar import ReaderImageInTar
from torch.utils.data import Dataset

from fastvim.data.pixels import DAMAGED, PictureReader, UnreadableImageError
from fastvim.data.transforms import Transform
from fastvim.errors import UserError, first_few

_logger = logging.getLogger(__name__)

# Names of a split's folder, the usual one first.
SPLIT_NAMES = {
    "train": ("train", "training"),
    "val": ("val", "validation", "valid", "eval", "evaluation"),
}
MAX_UNREADABLE = 10  # in a row; then more than single files are wrong


class ImageFiles(Dataset[tuple[torch.Tensor, int]]):
    """Images of one split and their class indices, (float32 (C, H, W), int).

    In training, the next readable image replaces a damaged one, with a warning. In evaluation
    it is an error, since a metric is of the whole split.

    Args:
        reader: a `Reader` of timm, whose base class declares neither length nor items.
        location: what `reader` reads, for messages.
        read_picture: opens an image file.
        transform: from a PIL image to a tensor.
        class_names: all classes in index order; the reader's own are mapped to them by name, and
            a reader without names gives these indices itself.
        training: replace unreadable images.

    Raises:
        UserError: when the split has a class that `class_names` lacks, or has images without a
            class folder, or has a label out of range (hidden labels are often -1);
            `UnreadableImageError` when reading, naming the file.
    """

    def __init__(
        self,
        reader: Any,
        location: str,
        read_picture: PictureReader,
        transform: Transform,
        class_names: Sequence[str],
        training: bool,
    ) -> None:
        self.reader = reader
        self.location = location
        self.read_picture = read_picture
        self.transform = transform
        self.training = training
        # From an index of the reader's own classes to one of `class_names`.
        self._class_index = list(range(len(class_names)))
        if own := reader_classes(reader):
            self._class_index = _map_classes(own, class_names, location)

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        for attempt in range(MAX_UNREADABLE):
            position = (index + attempt) % len(self)
            try:
                image, target = self._read(position)
            except UnreadableImageError as error:
                if not self.training or error.kind != DAMAGED:
                    raise
                message = str(error)
                _logger.warning("%s; the next one takes its place", message)
            else:
                return self.transform(image), self._class_of(position, target)
        raise UnreadableImageError(f"{message}, the last of {MAX_UNREADABLE} such in a row")

    def filename(self, index: int) -> str:
        """The path of the image, or its path inside a tar file."""
        return os.path.join(self.location, str(self.reader.filename(index)))

    def _read(self, index: int) -> tuple[Image.Image, int]:
        file, target = self.reader[index]
        with file:
            return self.read_picture(file, self.filename(index)), int(target)

    def _class_of(self, index: int, target: int) -> int:
        last = len(self._class_index) - 1
        if not 0 <= target <= last:
            raise UserError(f"{self.filename(index)}: label {target}; expected 0 to {last}")
        return self._class_index[target]


def find_split(root: str, split: str) -> Path | None:
    """`root/SPLIT/` or `root/SPLIT.tar`, under any of the names of that split."""
    names = next((names for names in SPLIT_NAMES.values() if split in names), ())
    for name in (split, *names):
        for path in (Path(root, name), Path(root, f"{name}.tar")):
            if path.exists():
                return path
    return None


def open_folder(root: str, split: str) -> ImageDataset:
    """timm's dataset of a split in the folder layout.

    Raises:
        UserError: when there is no such split, or no image in it.
    """
    if not Path(root).is_dir():
        raise UserError(f"{root}: no such directory; expected one with {split}/CLASS/*.jpg")
    path = find_split(root, split)
    if path is None:
        raise UserError(f"{root}: no split {split!r}; expected {root}/{split}/CLASS/*.jpg")
    try:
        return create_dataset("", root=str(path), search_split=False)
    except (RuntimeError, ValueError, OSError, tarfile.TarError) as error:
        endings = ", ".join(get_img_extensions())
        raise UserError(f"{path}: no images; expected {path}/CLASS/* ending {endings}") from error


def reader_classes(reader: Any) -> list[str]:
    """The names of a reader's classes in index order; empty when it has none."""
    in_tar = isinstance(reader, ReaderImageInTar)
    index = reader.class_name_to_idx if in_tar else reader.class_to_idx
    return [str(name) for name in sorted(index, key=index.__getitem__)]


def _map_classes(own: list[str], class_names: Sequence[str], location: str) -> list[int]:
    """The index in `class_names` of each of a split's own classes."""
    if "" in own:
        raise UserError(f"{location}: images outside class folders; expected {location}/CLASS/*")
    index = {name: position for position, name in enumerate(class_names)}
    unknown = [name for name in own if name not in index]
    if unknown:
        raise UserError(
            f"{location}: class {unknown[0]!r} is none of the {len(class_names)} classes expected, "
            f"{first_few(class_names)}"
        )
    return [index[name] for name in own]
