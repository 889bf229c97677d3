"""Files of the class of every pixel: their stored values, and what these stand for.

H, W: height and width of a mask
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from fastvim.data.classes import check_different
from fastvim.data.decoding import turn_values
from fastvim.data.pixels import PictureReader, UnreadableImageError, stored
from fastvim.errors import UserError, counted, first_few
from fastvim.labels import IGNORE_INDEX
from fastvim.storage import require_file

MODES = ("1", "L", "P", "I", "I;16")  # PIL's modes with one number a pixel
LIES_OR_NOT = (
    "turned photograph (EXIF) whose classes fit as stored too, taken as upright (or give "
    "--data.orientation stored)"
)
OUT_OF_RANGE = "value out of range"


@dataclass(frozen=True)
class Labels:
    """Which stored value stands for which class.

    Args:
        num_classes: at most 255.
        reduce_zero_label: a stored 0 is ignored and the classes are stored from 1.
        places: index of each class among those that weights know; None for its own.
    """

    num_classes: int
    reduce_zero_label: bool
    places: tuple[int, ...] | None = None

    @property
    def stored(self) -> range:
        """The stored value of each class."""
        first = int(self.reduce_zero_label)
        return range(first, first + self.num_classes)

    @property
    def ignored(self) -> Sequence[int]:
        """The stored values that do not count."""
        return (0, IGNORE_INDEX) if self.reduce_zero_label else (IGNORE_INDEX,)

    def indices(self, values: np.ndarray, path: Path) -> np.ndarray:
        """Class indices, uint8 (H, W), or `IGNORE_INDEX`, of stored values.

        Raises:
            UnreadableImageError: values of no class, with the number of their pixels.
        """
        last = self.stored[-1]
        wrong = values[((values < 0) | (values > last)) & (values != IGNORE_INDEX)]
        if wrong.size:
            found = [f"{value} ({counted(number, 'pixels')})" for value, number in count(wrong)]
            raise UnreadableImageError(
                f"{path}: value {first_few(found)}; expected 0 to {last}, or {IGNORE_INDEX} "
                f"(num_classes {self.num_classes})",
                OUT_OF_RANGE,
            )
        if self.reduce_zero_label:
            skipped = (values == 0) | (values == IGNORE_INDEX)
            values = np.where(skipped, IGNORE_INDEX, values - 1)
        if self.places is not None:
            place_of = np.full(IGNORE_INDEX + 1, IGNORE_INDEX, dtype=np.uint8)
            place_of[: self.num_classes] = self.places
            return place_of[values]
        return values.astype(np.uint8)


def read_names(path: Path, count: int) -> list[str]:
    """The names in a text file, one a line; of a table with tabs, the last column below the header.

    Raises:
        UserError: no such file, another number of names than `count`, or a name twice.
    """
    require_file(path)
    if not path.is_file():
        raise UserError(f"class_file: no file {path}")
    try:
        text = path.read_text(encoding="utf-8-sig")  # with a byte-order mark or without
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: expected a text in UTF-8 ({error})") from error
    lines = [line for line in text.splitlines() if line.strip()]
    if lines and "\t" in lines[0]:
        lines = lines[1:]
    names = [line.rpartition("\t")[2].strip() for line in lines]
    if len(names) != count:
        raise UserError(f"{path}: {len(names)} names; expected num_classes {count}")
    check_different(names, str(path))
    return names


def read_values(path: Path, read_picture: PictureReader) -> np.ndarray:
    """The values in a file, int64 (H, W).

    Raises:
        UnreadableImageError: a damaged file, or several numbers a pixel.
    """
    image = replace(read_picture, mode=None)(path)
    if image.mode not in MODES:
        raise UnreadableImageError(
            f"{path}: mode {image.mode}; expected one number a pixel", "classes as colours"
        )
    return np.array(image).astype(np.int64)


def read_pair(
    image_path: Path, mask_path: Path, read_picture: PictureReader, orientation: str
) -> tuple[Image.Image, np.ndarray, str]:
    """An upright image, the values of its mask (H, W), and what looks odd about the mask.

    Args:
        image_path: of the image.
        mask_path: of its mask.
        read_picture: opens both.
        orientation: of the mask: "exif", "stored" or "auto", as of `DenseDataModule`.

    Raises:
        UnreadableImageError: a file that cannot be used, or a mask of another size.
    """
    image, values = read_picture(image_path), read_values(mask_path, read_picture)
    upright, known = (image.height, image.width), stored(image)
    lies = known.orientation > 1 and values.shape == known.size[::-1]
    if lies and (orientation == "stored" or (orientation == "auto" and values.shape != upright)):
        return image, turn_values(values, known.orientation), ""
    if values.shape != upright:
        raise UnreadableImageError(
            f"{mask_path}: {values.shape[1]}x{values.shape[0]} pixels; expected "
            f"{image.width}x{image.height}, as {image_path.name} has"
            + (" upright (EXIF)" if known.orientation > 1 else ""),
            "classes of another size",
        )
    return image, values, LIES_OR_NOT if lies and orientation == "auto" else ""


def count(values: np.ndarray) -> tuple[tuple[int, int], ...]:
    """How often each value occurs, ascending."""
    if values.size and values.min() >= 0 and values.max() < 2**16:  # much faster than sorting
        counts = np.bincount(values.ravel())
        found = np.flatnonzero(counts)
        return tuple(zip(found.tolist(), counts[found].tolist(), strict=True))
    found, counts = np.unique(values, return_counts=True)
    return tuple(zip(found.tolist(), counts.tolist(), strict=True))
