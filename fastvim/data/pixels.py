"""From an image file to pixels: the one way for training, evaluation and the commands.

It settles what stored values mean, which way is up and how large an image may be.

H, W: height and width of an image
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image

from fastvim.data.decoding import (
    DAMAGED,
    MISSING_IMAGE,
    TOO_LARGE,
    TURNS,
    UNKNOWN_VALUES,
    Decoded,
    Source,
    UnreadableImageError,
    decode,
    decoded,
    refused,
)
from fastvim.errors import OptionError
from fastvim.options import COUNT, check_given

__all__ = [
    "DAMAGED",
    "MAX_PIXELS",
    "MISSING_IMAGE",
    "TOO_LARGE",
    "UNKNOWN_VALUES",
    "Brightest",
    "PictureReader",
    "Stored",
    "UnreadableImageError",
    "stored",
]

MAX_PIXELS = 178_956_970  # of an image by default, as Pillow has it

UNDONE = {6: 8, 8: 6}  # the orientation that turns back; the others are their own
# Pillow's modes that it converts to RGB and grey through another one only.
THROUGH = {"LAB": "RGB", "RGBa": "RGBA", "La": "LA"}


class Stored(NamedTuple):
    """What a file holds, before values are scaled and the image is turned.

    Attributes:
        mode: Pillow's.
        size: width and height.
        orientation: EXIF's, from 1 (upright) to 8.
        highest: value, where more than 8 bits are stored; else None.
        white: the value of the type that becomes white, likewise; None with a `value_range`.
        several: whether the file holds further images, which are not read.
    """

    mode: str
    size: tuple[int, int]
    orientation: int
    highest: float | None
    white: float | None
    several: bool


@dataclass(frozen=True)
class PictureReader:
    """Reads image files as upright images of 8 bits.

    A palette stands for its colours; transparency is left out. Values are scaled from `value_range`
    and clipped. Without a range 255 is white in 8 bits, 65535 in 16 and 1 in floating point; other
    integers, and floats outside 0 to 1, are refused.

    Args:
        mode: "RGB" or "L"; None for the values as stored, of any mode of Pillow, such as indices.
        value_range: the stored values that become black and white; None takes the type's. A range
            that ends beyond 255, or at 1, leaves images of 8 bits as they are.
        max_pixels: of an image; None for any number.

    Raises:
        UserError: for a range that is none.
        UnreadableImageError: when reading, naming the file.
    """

    mode: str | None = "RGB"
    value_range: tuple[float, float] | None = None
    max_pixels: int | None = MAX_PIXELS

    def __post_init__(self) -> None:
        if self.value_range is not None:
            low, high = self.value_range
            if not -math.inf < low < high < math.inf:
                raise OptionError("value_range", self.value_range, "two numbers, the lower first")
        check_given(COUNT, max_pixels=self.max_pixels)

    def __call__(self, source: Source, name: str = "", exif: bool = True) -> Image.Image:
        """The image in a file.

        Args:
            source: a path, or an open file.
            name: of the file, for messages; by default its path.
            exif: turn the image as its EXIF orientation says; False leaves it as stored.

        Returns:
            The image; `stored` tells what the file holds.
        """
        name = name or str(source)
        known = decode(source, name, self.max_pixels)
        told, left = known.orientation, known.left
        turn = left if exif else UNDONE.get(told, told) if left != told else 1
        size = known.image.size[::-1] if left != told and told > 4 else known.image.size
        highest = white = None
        if known.values is not None and self.mode is not None:
            highest = float(known.values.max())
            white = known.white if self.value_range is None else None
        image = _turned(self._converted(known, name), turn)
        what = Stored(known.image.mode, size, told, highest, white, known.several)
        image.info = {"stored": what}
        return image

    @property
    def scales_8_bits(self) -> bool:
        """Whether `value_range` counts for images of 8 bits."""
        return self.value_range is not None and 1 < self.value_range[1] <= 255

    def convert(self, image: Image.Image, name: str) -> Image.Image:
        """A decoded image in the wanted mode, turned as its EXIF orientation says.

        Args:
            image: of any mode of Pillow.
            name: of its file, for messages.
        """
        known = decoded(image)
        return _turned(self._converted(known, name), known.left)

    def _converted(self, known: Decoded, name: str) -> Image.Image:
        """An image in the wanted mode, not turned."""
        image, mode = known.image, self.mode
        if mode is None:
            return image.point(lambda value: value // known.step) if known.step > 1 else image
        if known.values is not None:
            low, high = self._black_and_white(known, name)
            return Image.fromarray(_scaled(known.values, low, high, known.inverted)).convert(mode)
        if image.mode == "P" and "transparency" in image.info:
            image = image.convert("RGBA")
        if image.mode != mode:
            image = image.convert(THROUGH.get(image.mode, mode)).convert(mode)
        if self.value_range is not None and self.scales_8_bits:
            table = _scaled(np.arange(256, dtype=np.uint16), *self.value_range)
            image = image.point(table.tolist() * len(mode))
        return image

    def _black_and_white(self, known: Decoded, name: str) -> tuple[float, float]:
        """The values that become black and white."""
        values = known.values
        assert values is not None
        if not np.isfinite(values).all():
            raise refused(name, "values that are not finite", "numbers")
        if self.value_range is not None:
            return self.value_range
        if known.white is not None:
            return 0, known.white
        low, high = values.min(), values.max()
        if values.dtype.kind == "f" and low >= 0 and high <= 1:
            return 0, 1
        found = f"{values.dtype} values {low:g} to {high:g}"
        raise refused(name, found, "value_range, the values of black and white")


def stored(image: Image.Image) -> Stored:
    """What the file of an image held that a `PictureReader` has read or converted."""
    return image.info["stored"]


def highest_value(image: Image.Image) -> tuple[float, float]:
    """The highest value of an image that a `PictureReader` has read, and the one that is white.

    The second is 0 where a `value_range` says what is white.
    """
    known = stored(image)
    if known.highest is None:
        return float(np.max(image.getextrema())), 255
    return known.highest, known.white or 0


class Brightest:
    """The highest values of a set of images, to find those that use little of their range.

    Args:
        whole: look at images of 8 bits too.
    """

    def __init__(self, whole: bool = True) -> None:
        self._whole = whole
        self._highest: dict[float, float] = {}  # by the value that is white
        self.number_of_8_bits = 0

    def add(self, image: Image.Image) -> None:
        """Look at an image that a `PictureReader` has read."""
        if not self._whole and stored(image).highest is None:
            return  # before its values are looked at
        highest, white = highest_value(image)
        if white:
            self.add_value(highest, white)

    def add_value(self, highest: float, white: float) -> None:
        """Take the highest value of an image, and the value that is white."""
        self.number_of_8_bits += white == 255
        self._highest[white] = max(highest, self._highest.get(white, highest))

    def join(self, other: Brightest) -> None:
        """Take what another has seen."""
        for white, highest in other._highest.items():
            self.add_value(highest, white)

    def warning(self) -> str:
        """One line if all values lie below a quarter of white, but not all are 0; else ""."""
        if any(4 * top >= white for white, top in self._highest.items()):
            return ""
        white, top = max(self._highest.items(), default=(0, 0))
        if not top:
            return ""
        usual = 2 ** max(1, int(top).bit_length()) - 1
        return (
            f"the highest value is {top:g}, less than a quarter of {white:g}, which is white: the "
            f"images are dark; --data.value_range [0,{usual}] would tell what is black and white"
        )


def _scaled(values: np.ndarray, low: float, high: float, inverted: bool = False) -> np.ndarray:
    """uint8: 0 for `low` and below, 255 for `high` and above."""
    exact = np.float32 if values.dtype.kind == "f" or values.itemsize == 2 else np.float64
    share = np.clip((values.astype(exact) - low) / (high - low), 0, 1)
    return np.rint(255 * (1 - share if inverted else share)).astype(np.uint8)


def _turned(image: Image.Image, orientation: int) -> Image.Image:
    """An image turned upright from an orientation; its EXIF data do not turn it again."""
    if orientation not in TURNS:
        return image
    image = image.transpose(TURNS[orientation])
    image.info = {}
    return image
