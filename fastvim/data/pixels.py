"""From an image file to pixels: the one way for training, evaluation and the commands.

It settles what stored values mean, which way is up and how large an image may be.

H, W: height and width of an image
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from fastvim.errors import UserError

MAX_PIXELS = 178_956_970  # of an image by default, as Pillow has it

# Kinds of `UnreadableImageError`.
DAMAGED = "unreadable image"
MISSING_IMAGE = "missing image file"
TOO_LARGE = "image of more than max_pixels"
UNKNOWN_VALUES = "values of unknown meaning"

ORIENTATION = 0x0112  # the EXIF tag
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
UNDONE = {6: 8, 8: 6}  # the orientation that turns back; the others are their own
BITS_PER_SAMPLE, PHOTOMETRIC, SAMPLE_FORMAT = 258, 262, 339  # TIFF tags
MIN_IS_WHITE, SIGNED = 0, 2  # values of the last two
# Pillow's modes that it converts to RGB and grey through another one only.
THROUGH = {"LAB": "RGB", "RGBa": "RGBA", "La": "LA"}


class UnreadableImageError(UserError):
    """An image file that cannot be decoded or used.

    Args:
        message: what is wrong with which file.
        kind: what is wrong, to count it by.
    """

    def __init__(self, message: str, kind: str = DAMAGED) -> None:
        # A DataLoader raises a worker's error with the traceback as message: keep the last line.
        line = message.strip().rpartition(f"{type(self).__name__}: ")[2]
        super().__init__(" ".join(line.split()))
        self.kind = kind


class Stored(NamedTuple):
    """What a file holds, before values are scaled and the image is turned.

    Attributes:
        mode: Pillow's.
        size: width and height.
        orientation: EXIF's, from 1 (upright) to 8.
        highest: value, where more than 8 bits are stored; else None.
        white: the value of the type that becomes white, likewise; None with a `value_range`.
    """

    mode: str
    size: tuple[int, int]
    orientation: int
    highest: float | None
    white: float | None


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
                shown = list(self.value_range)
                raise UserError(f"value_range {shown}: expected two numbers, the lower first")
        if self.max_pixels is not None and self.max_pixels < 1:
            raise UserError(f"max_pixels {self.max_pixels}: expected 1 or more, or null for any")

    def __call__(
        self, source: str | Path | IO[bytes], name: str = "", exif: bool = True
    ) -> Image.Image:
        """The image in a file.

        Args:
            source: a path, or an open file.
            name: of the file, for messages; by default its path.
            exif: turn the image as its EXIF orientation says; False leaves it as stored.

        Returns:
            The image; `stored` tells what the file holds.
        """
        name = name or str(source)
        try:
            with _without_pillows_limit(), Image.open(source) as image:
                self._check_size(image, name)
                told = _orientation(image)
                image.load()
        except FileNotFoundError as error:
            raise UnreadableImageError(f"{name}: no such file", MISSING_IMAGE) from error
        except UserError:
            raise
        except UnidentifiedImageError as error:
            raise _unidentified(source, name) from error
        except Exception as error:  # the decoders raise nearly anything on damaged files
            message = f"{name}: unreadable image ({error}); repair or delete it"
            raise UnreadableImageError(message) from error
        # Pillow itself turns TIFF files when it loads them.
        left = _orientation(image)
        turn = left if exif else UNDONE.get(told, told) if left != told else 1
        size = image.size[::-1] if left != told and told > 4 else image.size
        mode = image.mode
        image, highest, white = self._convert(image, name)
        image = _turned(image, turn)
        image.info = {"stored": Stored(mode, size, told, highest, white)}
        return image

    def convert(self, image: Image.Image, name: str) -> Image.Image:
        """A decoded image in the wanted mode, turned as its EXIF orientation says.

        Args:
            image: of any mode of Pillow.
            name: of its file, for messages.
        """
        turn = _orientation(image)
        return _turned(self._convert(image, name)[0], turn)

    def _convert(
        self, image: Image.Image, name: str
    ) -> tuple[Image.Image, float | None, float | None]:
        """An image in the wanted mode; its highest value and white, as in `Stored`."""
        mode = self.mode
        if mode is None:
            return image, None, None
        if image.mode[0] in "IF":
            values = _values(image)
            low, high = self._black_and_white(values, image, name)
            image = Image.fromarray(_scaled(values, low, high, _is_inverted(image)))
            white = high if self.value_range is None else None
            return image.convert(mode), float(values.max()), white
        if image.mode == "L" and _tag(image, SAMPLE_FORMAT) == SIGNED:
            raise _refused(name, "signed 8-bit values", "8 bits without sign")
        if image.mode == "P" and "transparency" in image.info:
            image = image.convert("RGBA")
        if image.mode != mode:
            image = image.convert(THROUGH.get(image.mode, mode)).convert(mode)
        if self.value_range is not None and 1 < self.value_range[1] <= 255:
            table = _scaled(np.arange(256, dtype=np.uint16), *self.value_range)
            image = image.point(table.tolist() * len(mode))
        return image, None, None

    def _check_size(self, image: Image.Image, name: str) -> None:
        if self.max_pixels is not None and image.width * image.height > self.max_pixels:
            raise UnreadableImageError(
                f"{name}: too large, {image.width}x{image.height} = "
                f"{image.width * image.height:,} pixels; expected at most max_pixels "
                f"{self.max_pixels:,} (--data.max_pixels of a run, --max-pixels of other commands)",
                TOO_LARGE,
            )

    def _black_and_white(
        self, values: np.ndarray, image: Image.Image, name: str
    ) -> tuple[float, float]:
        """The values that become black and white."""
        if not np.isfinite(values).all():
            raise _refused(name, "values that are not finite", "numbers")
        if self.value_range is not None:
            return self.value_range
        if image.mode.startswith("I;16"):
            return 0, 2 ** (_tag(image, BITS_PER_SAMPLE) or 16) - 1
        if image.mode == "I" and image.format in ("PNG", "PPM"):  # 16 bits, in Pillow's 32
            return 0, 65535
        low, high = values.min(), values.max()
        if image.mode == "F" and low >= 0 and high <= 1:
            return 0, 1
        found = f"{values.dtype} values {low:g} to {high:g}"
        raise _refused(name, found, "value_range, the values of black and white")


def stored(image: Image.Image) -> Stored:
    """What the file of an image held that a `PictureReader` has read or converted."""
    return image.info["stored"]


class Brightest:
    """The highest values of a set of images, to find those that use little of their range.

    Args:
        whole: look at images of 8 bits too.
    """

    def __init__(self, whole: bool = True) -> None:
        self._whole = whole
        self._highest: dict[float, float] = {}  # by the value that is white

    def add(self, image: Image.Image) -> None:
        """Look at an image that a `PictureReader` has read."""
        known = stored(image)
        if known.white is not None and known.highest is not None:
            white, highest = known.white, known.highest
        elif known.highest is None and self._whole:
            white, highest = 255, float(np.max(image.getextrema()))
        else:
            return
        self._highest[white] = max(highest, self._highest.get(white, highest))

    def warning(self) -> str:
        """One line if all values lie below a quarter of white; "" otherwise."""
        if not self._highest or any(4 * top >= white for white, top in self._highest.items()):
            return ""
        white, top = max(self._highest.items())
        usual = 2 ** max(1, int(top).bit_length()) - 1 if white > 1 else top or 1
        return (
            f"the highest value is {top:g}, less than a quarter of {white:g}, which is white: the "
            f"images are dark; value_range tells the values of black and white, as [0, {usual:g}]"
        )


def _values(image: Image.Image) -> np.ndarray:
    """The values (H, W) of an image of integers or of floating point."""
    values = np.asarray(image)
    unsigned = _tag(image, BITS_PER_SAMPLE) == 32 and _tag(image, SAMPLE_FORMAT) in (None, 1)
    return values.view(np.uint32) if image.mode == "I" and unsigned else values


def _scaled(values: np.ndarray, low: float, high: float, inverted: bool = False) -> np.ndarray:
    """uint8: 0 for `low` and below, 255 for `high` and above."""
    exact = np.float32 if values.dtype.kind == "f" or values.itemsize == 2 else np.float64
    share = np.clip((values.astype(exact) - low) / (high - low), 0, 1)
    return np.rint(255 * (1 - share if inverted else share)).astype(np.uint8)


def _tag(image: Image.Image, number: int) -> int | None:
    """The value of a TIFF tag, or the first of several; None without it."""
    value = getattr(image, "tag_v2", {}).get(number)
    return value[0] if isinstance(value, tuple) else value


def _is_inverted(image: Image.Image) -> bool:
    """Whether 0 is white, which Pillow heeds in TIFF files of 8 bits alone."""
    return _tag(image, PHOTOMETRIC) == MIN_IS_WHITE


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, from 1 (upright, or not told) to 8."""
    try:
        value = image.getexif().get(ORIENTATION, 1)
    except Exception:  # damaged EXIF data say nothing; the pixels may be sound
        return 1
    return value if value in TURNS else 1


def _turned(image: Image.Image, orientation: int) -> Image.Image:
    """An image turned upright from an orientation; its EXIF data do not turn it again."""
    if orientation not in TURNS:
        return image
    image = image.transpose(TURNS[orientation])
    image.info = {}
    return image


def _refused(name: str, found: str, expected: str) -> UnreadableImageError:
    return UnreadableImageError(f"{name}: {found}; expected {expected}", UNKNOWN_VALUES)


def _unidentified(source: str | Path | IO[bytes], name: str) -> UnreadableImageError:
    """Why Pillow does not know a file: no image, or a TIFF of an unusual type."""
    if isinstance(source, str | Path):
        with open(source, "rb") as file:
            begin = file.read(4)
    else:
        source.seek(0)
        begin = source.read(4)
    if begin in (b"II*\0", b"MM\0*"):
        return _refused(name, "a TIFF file of a type that Pillow cannot read", "8 or 16 bits")
    return UnreadableImageError(
        f"{name}: unreadable image (of no format that Pillow knows); repair or delete it"
    )


_lock = threading.Lock()
_reading = 0  # files that are open
_limit: int | None = None  # Pillow's, meanwhile


@contextmanager
def _without_pillows_limit() -> Iterator[None]:
    """`max_pixels` alone limits the size: Pillow's own limit is one global of the process."""
    global _reading, _limit
    with _lock:
        if not _reading:
            _limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        _reading += 1
    try:
        yield
    finally:
        with _lock:
            _reading -= 1
            if not _reading:
                Image.MAX_IMAGE_PIXELS = _limit
