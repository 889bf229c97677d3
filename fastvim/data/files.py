"""Image files of one split: their classes, and damaged files."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset, Subset

from fastvim.data.classes import places
from fastvim.data.finishing import Drawn
from fastvim.data.folders import ClassFolders
from fastvim.data.issues import Look, look_at_picture
from fastvim.data.packed import PackedFolders
from fastvim.data.pixels import DAMAGED, PictureReader, UnreadableImageError
from fastvim.data.transforms import ToPixels
from fastvim.errors import UserError

_logger = logging.getLogger(__name__)

MAX_UNREADABLE = 10  # in a row; then more than single files are wrong


class ImageFiles(Dataset[tuple[torch.Tensor | Drawn, int]]):
    """Images of one split, as `transform` gives them, and their class indices.

    In training, the next readable image replaces a damaged one, with a warning. In evaluation
    it is an error, since a metric is of the whole split.

    Args:
        reader: `ClassFolders` or a `Reader` of timm: gives open files and class indices.
        location: what `reader` reads, for messages.
        read_picture: opens an image file.
        transform: from a PIL image to a tensor, or to `Drawn`.
        class_names: all classes in index order; the reader's own are mapped to them by name, and
            a reader without names gives these indices itself. None for images without classes,
            whose index is -1.
        training: replace unreadable images.
        of: whose the classes are, for messages.

    Raises:
        UserError: when the split has a class that `class_names` lacks, or has a label out of range
            (hidden labels are often -1); `UnreadableImageError` when reading, naming the file.
    """

    def __init__(
        self,
        reader: Any,
        location: str,
        read_picture: PictureReader,
        transform: ToPixels,
        class_names: Sequence[str] | None,
        training: bool,
        of: str = "expected",
    ) -> None:
        self.reader = reader
        self.location = location
        self.read_picture = read_picture
        self.transform = transform
        self.training = training
        # From an index of the reader's own classes to one of `class_names`.
        self._class_index = None if class_names is None else list(range(len(class_names)))
        if class_names is not None and (own := reader_classes(reader)):
            self._class_index = places(own, class_names, location, of)

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> tuple[torch.Tensor | Drawn, int]:
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

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[torch.Tensor | Drawn, int]]:
        """The images of a batch: what torch's loader calls."""
        self.read_ahead(indices)
        return [self[index] for index in indices]

    def read_ahead(self, indices: Sequence[int]) -> None:
        """Begin to read some images from the disk, where they are packed."""
        if isinstance(self.reader, PackedFolders):
            self.reader.read_ahead(indices)

    def filename(self, index: int) -> str:
        """The path of the image, or the one that it would have outside its tar file or pack."""
        return os.path.join(self.location, str(self.reader.filename(index)))

    def look(self, index: int) -> Look:
        """What an image shows, for `fastvim.data.checks`."""
        if isinstance(self.reader, PackedFolders):
            self.reader.verify(index)
        image, target = self._read(index)
        return look_at_picture(image)._replace(label=self._class_of(index, target))

    def sources(self, index: int) -> tuple[str, ...]:
        """The file, or the one that holds it with others."""
        if isinstance(self.reader, ClassFolders):
            return (self.reader.source(index),)
        return (self.filename(index),)

    @property
    def targets(self) -> np.ndarray | None:
        """Class index of each image, where it has one and the reader knows it without reading."""
        own = getattr(self.reader, "targets", None)
        if own is None or self._class_index is None:
            return None
        return np.asarray(self._class_index)[own]

    def _read(self, index: int) -> tuple[Image.Image, int]:
        name = self.filename(index)
        try:
            file, target = self.reader[index]
        except OSError as error:
            raise UnreadableImageError(f"{name}: unreadable image ({error.strerror})") from error
        except UserError as error:  # a pipe or the like
            raise UnreadableImageError(str(error)) from error
        with file:
            return self.read_picture(file, name), int(target)

    def _class_of(self, index: int, target: int) -> int:
        if self._class_index is None:
            return -1
        last = len(self._class_index) - 1
        if not 0 <= target <= last:
            raise UserError(f"{self.filename(index)}: label {target}; expected 0 to {last}")
        return self._class_index[target]


class Chosen(Subset[Any]):
    """Some of a dataset's samples, which can be examined as it can."""

    def read_ahead(self, indices: Sequence[int]) -> None:
        """Begin to read some samples from the disk, where they are packed."""
        if isinstance(self.dataset, ImageFiles):
            self.dataset.read_ahead([self.indices[index] for index in indices])

    def look(self, index: int) -> Look:
        """What a sample shows, for `fastvim.data.checks`."""
        return self.dataset.look(self.indices[index])  # type: ignore[attr-defined]

    def filename(self, index: int) -> str:
        """The image's file, for messages."""
        return self.dataset.filename(self.indices[index])  # type: ignore[attr-defined]

    def sources(self, index: int) -> tuple[str, ...]:
        """The files that `look` reads."""
        return self.dataset.sources(self.indices[index])  # type: ignore[attr-defined]

    @property
    def targets(self) -> np.ndarray | None:
        """Class index of each sample, where they are known without reading."""
        own = getattr(self.dataset, "targets", None)
        return None if own is None else own[np.asarray(self.indices)]


def reader_classes(reader: Any) -> list[str]:
    """The names of a reader's classes in index order; empty when it has none."""
    index = reader.class_to_idx
    return [str(name) for name in sorted(index, key=index.__getitem__)]
