"""What image files hold: decoded by Pillow, with all bits of their values.

H, W: height and width of an image; C: its channels
"""

from __future__ import annotations

import struct
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.lib.format import (
    MAGIC_PREFIX,
    read_array_header_1_0,
    read_array_header_2_0,
    read_magic,
)
from PIL import Image, UnidentifiedImageError
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from fastvim.errors import UserError
from fastvim.storage import require_file

# The common formats first: by their names alone, Pillow would try others before it comes to JPEG.
Image.preinit()

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
# TIFF tags, and values of the last three.
BITS_PER_SAMPLE, PHOTOMETRIC, PLANAR, SAMPLE_FORMAT = 258, 262, 284, 339
MIN_IS_WHITE, SEPARATE, SIGNED = 0, 2, 2
WIDTH, LENGTH, SAMPLES_PER_PIXEL = 256, 257, 277
PIXELS = {273, 324}  # where strips or tiles are
SAMPLE_TYPES = {1: "uint", 2: "int", 3: "float", 5: "complex int", 6: "complex"}
TIFF, BIG = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"), (b"+\0", b"\0+")
PICTURE = (
    "a picture: grey of at most 32 bits, or shape (height, width, 3) of 8 or 16 bits; other arrays "
    "are for models of channels and data from a table (ChannelData)"
)
# The other order of the two bytes of a value: big-endian, little-endian, native.
OTHER_ORDER = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}
PLANES = " in separate planes"
SEVERAL = ("GIF", "PNG", "TIFF", "WEBP")  # may hold images that are no previews or layers
STEPS = {"L;4": 17, "L;2": 85}  # by what Pillow calls the stored pixels

Source = str | Path | IO[bytes]


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


class Decoded(NamedTuple):
    """The content of an image file.

    Attributes:
        image: as Pillow reads it; of 16-bit colours it takes the first byte.
        orientation: EXIF's, from 1 (upright) to 8.
        left: the orientation that the image still has: Pillow itself turns TIFF files.
        values: (H, W) or (H, W, C) as stored, unless they are 8 bits without sign.
        white: the highest value of their type; None where no type tells it.
        inverted: whether 0 is white in `values`.
        step: what Pillow multiplies stored values by: of grey in 2 and 4 bits, up to 255.
        several: whether the file holds further images, such as pages.
    """

    image: Image.Image
    orientation: int
    left: int
    values: np.ndarray | None = None
    white: float | None = None
    inverted: bool = False
    step: int = 1
    several: bool = False


def decode(source: Source, name: str, max_pixels: int | None) -> Decoded:
    """The content of an image file.

    Args:
        source: a path, or an open file.
        name: of the file, for messages.
        max_pixels: of an image; None for any number.

    Raises:
        UnreadableImageError: no such file, a damaged one, one of too many pixels or of values that
            cannot be read.
    """
    try:
        if not isinstance(source, str | Path):
            return _decode(source, name, max_pixels)
        # Not by its name: Pillow would map a TIFF file into memory, and mix up the rows of one that
        # lies on its side.
        require_file(source)
        with open(source, "rb") as file:
            return _decode(file, name, max_pixels)
    except FileNotFoundError as error:
        raise UnreadableImageError(f"{name}: no such file", MISSING_IMAGE) from error
    except UnreadableImageError:
        raise
    except UserError as error:
        raise UnreadableImageError(str(error)) from error
    except MemoryError as error:
        raise UnreadableImageError(f"{name}: does not fit in memory", TOO_LARGE) from error
    except Exception as error:  # the decoders raise nearly anything on damaged files
        message = f"{name}: unreadable image ({error}); repair or delete it"
        raise UnreadableImageError(message) from error


def _decode(file: IO[bytes], name: str, max_pixels: int | None) -> Decoded:
    with without_pillows_limit():
        try:
            image = Image.open(file)
        except UnidentifiedImageError as error:
            raise _unidentified(file, name) from error
        check_size(image.size, max_pixels, name)
        stored = _raw_mode(image)  # before the EXIF data, for which Pillow loads PNG files
        if stored.endswith(PLANES) and _tag(image, SAMPLES_PER_PIXEL) not in (None, 1):
            raise refused(name, _describe_tiff(file), PICTURE)
        orientation = orientation_of(image)
        # Asked before loading: a GIF file is read on for it.
        several = image.format in SEVERAL and getattr(image, "is_animated", False)
        image.load()
        known = decoded(image)._replace(
            orientation=orientation, step=STEPS.get(stored, 1), several=several
        )
        if ";16" in stored and known.values is None:
            values = _all_16_bits(file, image, stored, name)
            known = known._replace(values=values, white=65535)
    return known


def decoded(image: Image.Image) -> Decoded:
    """The content of an image that Pillow has loaded."""
    left = orientation_of(image)
    bits, sample_format = _tag(image, BITS_PER_SAMPLE), _tag(image, SAMPLE_FORMAT)
    if image.mode == "L" and sample_format == SIGNED:
        return Decoded(image, left, left, np.asarray(image).view(np.int8))
    if image.mode[0] not in "IF":
        return Decoded(image, left, left)
    values, white = np.asarray(image), None
    if image.mode.startswith("I;16"):
        white = 2 ** (bits or 16) - 1
    elif image.mode == "I" and image.format in ("PNG", "PPM"):  # 16 bits, in Pillow's 32
        white = 65535
    elif image.mode == "I" and bits == 32 and sample_format != SIGNED:
        values = values.view(np.uint32)
    return Decoded(image, left, left, values, white, _tag(image, PHOTOMETRIC) == MIN_IS_WHITE)


def check_size(size: tuple[int, int], max_pixels: int | None, name: str) -> None:
    """Raise UnreadableImageError for an image of more than `max_pixels`; None for any number."""
    width, height = size
    if max_pixels is not None and width * height > max_pixels:
        raise UnreadableImageError(
            f"{name}: too large, {width}x{height} = {width * height:,} pixels; expected at most "
            f"max_pixels {max_pixels:,} (--data.max_pixels of a run, --max-pixels of other "
            "commands)",
            TOO_LARGE,
        )


def turn_values(values: np.ndarray, orientation: int) -> np.ndarray:
    """Values (..., H, W) of an image turned upright from an EXIF orientation."""
    if orientation not in TURNS:
        return values
    if orientation > 4:
        values = values.swapaxes(-1, -2)
    down = -1 if orientation in (3, 4, 7, 8) else 1
    across = -1 if orientation in (2, 3, 6, 7) else 1
    return np.ascontiguousarray(values[..., ::down, ::across])


def refused(name: str, found: str, expected: str) -> UnreadableImageError:
    """The error of a sound file with values whose meaning is not known."""
    return UnreadableImageError(f"{name}: {found}; expected {expected}", UNKNOWN_VALUES)


def stored_size(path: Path) -> tuple[tuple[int, int], int]:
    """Width and height as stored and the EXIF orientation, from the header of a file alone.

    The orientation is 1 where nothing can be read, and of TIFF files, which Pillow turns itself.
    """
    try:
        require_file(path)
        with without_pillows_limit(), Image.open(path) as image:
            return image.size, 1 if image.format == "TIFF" else orientation_of(image)
    except Exception:  # reading the whole file says what is wrong
        return (0, 0), 1


def orientation_of(image: Image.Image) -> int:
    """The EXIF orientation, from 1 (upright, or not told) to 8."""
    try:
        value = image.getexif().get(ORIENTATION, 1)
    except Exception:  # damaged EXIF data say nothing; the pixels may be sound
        return 1
    return value if value in TURNS else 1


def _tag(image: Image.Image, number: int) -> int | None:
    """The value of a TIFF tag, or the first of several; None without it."""
    value = getattr(image, "tag_v2", {}).get(number)
    return value[0] if isinstance(value, tuple) else value


def _raw_mode(image: Any) -> str:
    """How a file stores a pixel, in Pillow's words, such as "RGB;16B"; "" if it does not say."""
    words = image.tile[0][3] if image.tile else ""
    first = words[0] if isinstance(words, tuple) and words else words
    if _tag(image, PLANAR) == SEPARATE and _tag(image, BITS_PER_SAMPLE) == 16:
        return f"{image.mode};16{PLANES}"
    return first if isinstance(first, str) else ""


def _all_16_bits(file: IO[bytes], image: Image.Image, stored: str, name: str) -> np.ndarray:
    """uint16 (H, W, C) of 16-bit colours, of which an image has the first bytes.

    The file is decoded once more, in the other order of bytes. Of grey with transparency, which
    Pillow has no other order of, as four single bytes; the transparency is left out.
    """
    mode, _, order = stored.partition(";16")
    if stored == "LA;16B":
        other = "RGBA"
    elif mode in ("RGB", "RGBA", "RGBX") and order in OTHER_ORDER:
        other = f"{mode};16{OTHER_ORDER[order]}"
    else:
        raise refused(name, f"16-bit values stored as {stored}", "grey or interleaved RGB")
    file.seek(0)
    again: Any = Image.open(file)
    again.tile = [
        tile._replace(args=(other, *tile.args[1:]) if isinstance(tile.args, tuple) else other)
        for tile in again.tile
    ]
    again.load()
    first, second = np.asarray(image), np.asarray(again)
    if other == "RGBA":
        first, second = second[..., 0], second[..., 1]
    return first.astype(np.uint16) << 8 | second


def _unidentified(file: IO[bytes], name: str) -> UnreadableImageError:
    """Why Pillow does not know a file: no image, an array, or a TIFF of an unusual type."""
    try:
        file.seek(0)
        if (begin := file.read(6)) == MAGIC_PREFIX:
            return refused(name, _describe_npy(file), PICTURE)
        if begin[:4] in TIFF:
            return refused(name, _describe_tiff(file), PICTURE)
    except (KeyError, ValueError, TypeError, SyntaxError, OSError, struct.error):
        pass  # damaged in its first bytes
    return UnreadableImageError(
        f"{name}: unreadable image (of no format that Pillow knows); repair or delete it"
    )


def _describe_npy(file: IO[bytes]) -> str:
    """The shape and type of an NPY array, from its header."""
    file.seek(0)
    version = read_magic(file)
    shape, _, dtype = (read_array_header_1_0 if version == (1, 0) else read_array_header_2_0)(file)
    return f"an NPY array of shape {shape} and type {dtype}"


def _describe_tiff(file: IO[bytes]) -> str:
    """The shape and type of the first image in a TIFF file, from its tags."""
    file.seek(0)
    head = file.read(8)
    tags = ImageFileDirectory_v2(head + file.read(8) if head[2:4] in BIG else head)
    file.seek(tags.next)
    tags.load(file)
    if not PIXELS & tags.keys():
        raise ValueError("cut off before the place of the pixels")
    channels = tags.get(SAMPLES_PER_PIXEL, 1)
    shape = tags[LENGTH], tags[WIDTH], *((channels,) if channels > 1 else ())
    bits = tags.get(BITS_PER_SAMPLE, (1,))[0]
    letter = SAMPLE_TYPES.get(tags.get(SAMPLE_FORMAT, (1,))[0], "unknown ")
    planes = PLANES if channels > 1 and tags.get(PLANAR) == SEPARATE else ""
    return f"a TIFF image of shape {shape} and type {letter}{bits}{planes}"


_lock = threading.Lock()
_reading = 0  # files that are open
_limit: int | None = None  # Pillow's, meanwhile


@contextmanager
def without_pillows_limit() -> Iterator[None]:
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
