"""Image files that a trained model is given: read and prepared.

C, H, W: channels, height and width of an image
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from io import BytesIO
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from fastvim.data import channel_transforms
from fastvim.data.arrays import DECODERS, read_array
from fastvim.data.decoding import Source
from fastvim.data.folders import image_endings
from fastvim.data.issues import SEVERAL_IMAGES
from fastvim.data.pixels import MAX_PIXELS, Brightest, PictureReader, stored
from fastvim.data.remote import is_url, read_bytes
from fastvim.data.transforms import IMAGE_MODES, ImageTransform, evaluation_transform
from fastvim.errors import UserError
from fastvim.inference.parts.work import Item
from fastvim.models import FastChannelVim

ALL_ENDINGS = image_endings() | set(DECODERS)  # of images for any model


@dataclass
class Seen:
    """What was seen of pictures beside their pixels.

    Attributes:
        brightest: of them.
        several: files that hold further images, such as pages, which were not read.
    """

    brightest: Brightest = field(default_factory=lambda: Brightest(whole=False))
    several: int = 0

    def add(self, other: Seen) -> None:
        """Take what was seen elsewhere."""
        self.brightest.join(other.brightest)
        self.several += other.several

    @property
    def remarks(self) -> list[str]:
        """Lines for the user."""
        lines = [f"{self.several:,} x {SEVERAL_IMAGES}"] if self.several else []
        if warning := self.brightest.warning():
            lines.append(f"{warning} (here --value-range)")
        return lines


class Pictures:
    """Reads the image files that Pillow opens.

    Args:
        reader: from a path, or an open file and its name, to an image.
        transform: of the image, such as the `pixels` of an `ImageTransform`.
        exif: turn images as their EXIF orientation says; False leaves them as stored.
    """

    def __init__(
        self, reader: PictureReader, transform: Callable[[Any], Any], exif: bool = True
    ) -> None:
        self.reader, self.transform, self.exif = reader, transform, exif
        self._seen = Seen()

    def __call__(self, path: str) -> Any:
        return self.image(BytesIO(read_bytes(path)) if is_url(path) else path, path)

    def image(self, source: Source, path: str) -> Any:
        """What becomes of the image in a file, or in the content of one, of that path."""
        image = self.reader(source, path, exif=self.exif)
        self._seen.brightest.add(image)
        self._seen.several += stored(image).several
        return self.transform(image)

    batch = staticmethod(default_collate)

    def told(self) -> Seen:
        """What it has seen since the last call."""
        seen, self._seen = self._seen, Seen()
        return seen


class Arrays:
    """Reads files of any number of channels (`fastvim.data.arrays`).

    Args:
        transform: of the values as stored, float32 (C, H, W).
        in_chans: channels that an image must have.
        max_pixels: of a channel; None for any number.
    """

    def __init__(
        self, transform: Callable[[Tensor], Tensor], in_chans: int, max_pixels: int | None
    ) -> None:
        self.transform, self.in_chans, self.max_pixels = transform, in_chans, max_pixels

    def __call__(self, path: str) -> Tensor:
        values = read_array(path, max_pixels=self.max_pixels)
        if len(values) != self.in_chans:
            raise UserError(f"shape {values.shape}; expected ({self.in_chans}, height, width)")
        return self.transform(torch.from_numpy(values.astype(np.float32)))

    batch = staticmethod(default_collate)

    def told(self) -> Seen:
        """Nothing: the values have no white."""
        return Seen()


def with_stems(found: Iterable[Item]) -> Iterator[Item]:
    """Each item with a "stem" of its own: its file's name without ending, perhaps with a number."""
    taken: set[int] = set()  # hashes: of millions of names, and one that is alike costs a number
    times: dict[str, int] = {}
    for item in found:
        stem = name = PurePath(item["path"]).stem
        while hash(name) in taken:
            times[stem] = times.get(stem, 1) + 1
            name = f"{stem}-{times[stem]}"
        taken.add(hash(name))
        yield {**item, "stem": name}


def picture_reader(
    metadata: dict[str, Any],
    value_range: Sequence[float] | None = None,
    max_pixels: int | None = None,
) -> PictureReader:
    """Reads pictures as the training of a model did.

    Args:
        metadata: of the weights' file.
        value_range: the values of black and white; None for those of the training.
        max_pixels: of a picture; None for `MAX_PIXELS`.
    """
    told = value_range or metadata.get("value_range")
    limits = (told[0], told[1]) if told else None
    return PictureReader("RGB", limits, max_pixels or MAX_PIXELS)


def reader(
    model: nn.Module, settings: dict[str, Any], read_picture: PictureReader
) -> tuple[Pictures | Arrays, ImageTransform | None, Collection[str]]:
    """How a classifier's images are read, and the endings of the files that it takes.

    Of pictures, uint8 pixels are read, which the `finish` of the transform normalises.

    Args:
        model: the classifier.
        settings: of `fastvim.weights.usage.image_settings`.
        read_picture: opens an image file.
    """
    if isinstance(model, FastChannelVim):
        if read_picture.value_range is not None:
            raise UserError("value_range: a channel model takes the values as stored")
        size = (settings["img_size"], settings["mean"], settings["std"])
        transform = channel_transforms.evaluation_transform(*size)
        arrays = Arrays(transform, len(settings["mean"]), read_picture.max_pixels)
        return arrays, None, DECODERS
    prepare = evaluation_transform(**settings)
    read_picture = replace(read_picture, mode=IMAGE_MODES[settings["in_chans"]])
    return Pictures(read_picture, prepare.pixels), prepare, image_endings()
