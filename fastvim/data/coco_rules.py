"""What the fields of a COCO file must be, and how boxes, masks and images must agree.

W, H: an image's width and height; n: annotations looked at together
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import PurePath
from typing import Any, NamedTuple

import numpy as np

from fastvim.data import run_lengths

Fault = tuple[str, str]  # the kind of mistake, and details
DAMAGED_MASK = "damaged mask"
LARGEST = 1e12  # of a number that means pixels
LARGEST_SIDE = 1 << 24
LONGEST = 100  # a polygon's length in sides of its image
NEAR = 2.0  # pixels between edges that are the same
APART = 4.0  # pixels between edges that may differ by rounding and drawing
_NUMBERS = {int, float}
_SURROGATES = re.compile("[\ud800-\udfff]")


# The fields.


class Field(NamedTuple):
    """A field of a JSON object.

    Attributes:
        name: in the file.
        fits: whether a value is what it must be.
        expected: the same in words.
        optional: it may be missing or null.
        noun: what it is called in messages.
    """

    name: str
    fits: Callable[[Any], bool]
    expected: str
    optional: bool = False
    noun: str = ""


def is_number(value: Any) -> bool:
    """Whether a value is a finite number, not a truth value, and none that overflows."""
    return type(value) in _NUMBERS and -LARGEST < value < LARGEST


def is_id(value: Any) -> bool:
    """Whether a value is a whole number or text."""
    return type(value) is int or (type(value) is float and value.is_integer()) or is_text(value)


def is_text(value: Any) -> bool:
    """Whether a value is text of more than blanks, which can be written as UTF-8."""
    return type(value) is str and bool(value.strip()) and not _SURROGATES.search(value)


def _is_side(value: Any) -> bool:
    return is_number(value) and value == int(value) and 1 <= value <= LARGEST_SIDE


def _is_below(value: Any) -> bool:
    """Whether a file name stays below its folder."""
    if not is_text(value) or "\0" in value:
        return False
    path = PurePath(value)
    return not path.is_absolute() and ".." not in path.parts


def _is_box(value: Any) -> bool:
    return type(value) is list and len(value) == 4 and all(map(is_number, value))


def _is_flag(value: Any) -> bool:
    return type(value) in (int, float, bool) and value in (0, 1)


IMAGE = (
    Field("id", is_id, "a whole number or text"),
    Field("file_name", _is_below, "the name of a file below the folder of the images"),
    Field("width", _is_side, "a whole number from 1 on"),
    Field("height", _is_side, "a whole number from 1 on"),
)
CATEGORY = (
    Field("id", is_id, "a whole number or text"),
    Field("name", lambda value: is_text(value) or type(value) is int, "text", optional=True),
)
ANNOTATION = (
    Field("bbox", _is_box, "x, y, width, height", noun="box"),
    Field("iscrowd", _is_flag, "0 or 1", optional=True),
    Field("ignore", _is_flag, "0 or 1", optional=True),
    Field("area", lambda v: is_number(v) and v >= 0, "a number from 0 on", optional=True),
)


def fault_of(item: Any, fields: Sequence[Field]) -> Fault | None:
    """The first field of a JSON object that is not what it must be."""
    if type(item) is not dict:
        return "entry that is no object", f", {show(item)}"
    for name, fits, expected, optional, noun in fields:
        value = item.get(name)
        if value is None or value == []:
            if optional and value is None:
                continue
            return f"missing {noun or name}", ""
        if not fits(value):
            return f"{noun or name} that is not {expected}", f", {name} {show(value)}"
    return None


def mask_fault(mask: Any, width: int, height: int) -> Fault | None:
    """Why a "segmentation" is neither polygons nor run lengths of its image, by its types alone."""
    if not mask:
        return "missing mask", ""
    if type(mask) is dict:
        counts = mask.get("counts")
        if mask.get("size") != [height, width]:
            return "mask of another size", f", {show(mask.get('size'))} for {[height, width]}"
        if type(counts) is list and set(map(type, counts)) == {int}:
            sound = min(counts) >= 0 and max(counts) <= run_lengths.LONGEST_RUN
        else:
            sound = type(counts) is str and bool(counts)
        return None if sound else (DAMAGED_MASK, f", counts {show(counts)}")
    if type(mask) is not list or not all(type(part) is list for part in mask):
        return "mask that is neither polygons nor run lengths", f", {show(mask)}"
    for part in mask:
        if not _NUMBERS.issuperset(map(type, part)):
            return "polygon that is not numbers x1, y1, x2, y2, ...", f", {show(part)}"
        if len(part) < 6 or len(part) % 2:
            return "polygon of fewer than three points", f", {show(part)}"
    return None


def show(value: Any) -> str:
    """A value of a file in a message: in one line, and shortened."""
    return reprlib.repr(value)


# Boxes, masks and images.


@dataclass
class Geometry:
    """Boxes and masks of annotations, each in its image.

    Attributes:
        numbers: of the box as the file has them, float64 (n, 4).
        box: its x1, y1, x2, y2, (n, 4).
        mask: x1, y1, x2, y2 of what the mask covers, float64 (n, 4).
        size: W and H, float64 (n, 2).
        pixels: of the image as run lengths have it; W * H for polygons, (n,).
        area: of the mask, (n,).
        length: of the outline of polygons, in pixels, (n,).
    """

    numbers: np.ndarray
    box: np.ndarray
    mask: np.ndarray
    size: np.ndarray
    pixels: np.ndarray
    area: np.ndarray
    length: np.ndarray

    @classmethod
    def of(cls, annotations: Sequence[Any], sizes: Sequence[tuple[int, int]]) -> Geometry:
        """Of annotations whose fields have no fault, and widths and heights of their images."""
        numbers = np.array([each["bbox"] for each in annotations], dtype=np.float64).reshape(-1, 4)
        box = np.concatenate([numbers[:, :2], numbers[:, :2] + numbers[:, 2:]], axis=1)
        size = np.array(sizes, dtype=np.float64).reshape(-1, 2)
        masks = [each["segmentation"] for each in annotations]
        drawn = np.array([type(mask) is list for mask in masks], dtype=bool)
        zeros = np.zeros((2, len(masks)))
        geometry = cls(numbers, box, np.zeros_like(box), size, size.prod(1), *zeros)
        geometry._add_polygons(np.flatnonzero(drawn), masks)
        geometry._add_runs(np.flatnonzero(~drawn), masks)
        return geometry

    def _add_polygons(self, indices: np.ndarray, masks: Sequence[Any]) -> None:
        if not len(indices):
            return
        parts = [part for index in indices for part in masks[index]]
        points = _floats(parts).reshape(-1, 2)
        sizes = np.array([len(part) for part in parts]) // 2
        starts = np.cumsum(sizes) - sizes
        following = np.arange(1, len(points) + 1)
        following[starts + sizes - 1] = starts  # the last point of a part is joined to its first
        with np.errstate(invalid="ignore", over="ignore"):
            x, y = points.T
            step = np.abs(points[following] - points).max(1)
            crossed = np.add.reduceat(x * y[following] - x[following] * y, starts)
        count = np.array([len(masks[index]) for index in indices])
        first = np.cumsum(count) - count  # of the parts of each mask
        low = np.minimum.reduceat(points, starts[first])
        high = np.maximum.reduceat(points, starts[first])
        self.mask[indices] = np.concatenate([low, high], axis=1)
        self.length[indices] = np.add.reduceat(step, starts[first])
        self.area[indices] = np.add.reduceat(np.abs(crossed) / 2, first)

    def _add_runs(self, indices: np.ndarray, masks: Sequence[Any]) -> None:
        counts = [masks[index]["counts"] for index in indices]
        found = run_lengths.shown(counts, self.size[indices, 1].astype(np.int64))
        self.pixels[indices], self.area[indices] = found.pixels, found.area
        self.mask[indices] = found.bounds

    def describe(self, index: int) -> str:
        """Box, mask and image of an annotation, for messages."""
        box, mask, size = (
            np.round(values[index], 2).tolist() for values in (self.box, self.mask, self.size)
        )
        return f", box {box} and mask {mask} as x1, y1, x2, y2 in {size[0]:g}x{size[1]:g}"


def _floats(parts: Sequence[Sequence[float]]) -> np.ndarray:
    """All numbers of some lists; infinite where they overflow."""
    numbers = chain.from_iterable(parts)
    try:
        return np.fromiter(numbers, np.float64)
    except OverflowError:
        finite = (value if abs(value) < LARGEST else np.inf for value in chain.from_iterable(parts))
        return np.fromiter(finite, np.float64)


def _inside(bounds: np.ndarray, size: np.ndarray) -> np.ndarray:
    """x1, y1, x2, y2 cut at the borders of the images."""
    return np.clip(bounds, 0, np.tile(size, 2))


def _area(bounds: np.ndarray) -> np.ndarray:
    return np.prod(np.maximum(bounds[:, 2:] - bounds[:, :2], 0), axis=1)


def _same(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Whether bounds are the same, but for rounding."""
    return np.abs(one - other).max(1) <= NEAR


def _far(bounds: np.ndarray, size: np.ndarray) -> np.ndarray:
    """Whether bounds are beyond the image by more than its longer side."""
    margin = size.max(1, keepdims=True)
    return ((bounds < -margin) | (bounds > np.tile(size, 2) + margin)).any(1)


def _in_shares(g: Geometry) -> np.ndarray:
    """Boxes of numbers from 0 to 1, not all of them whole."""
    return ((g.numbers >= 0) & (g.numbers <= 1)).all(1) & (g.numbers % 1 != 0).any(1)


def _leaves(g: Geometry) -> np.ndarray:
    """Boxes of which less than a half lies in the image, but some."""
    inside = _area(_inside(g.box, g.size))
    return (inside > 0) & (inside < 0.5 * _area(g.box))


def _misfits(g: Geometry) -> np.ndarray:
    """Boxes that share less than half of their area with that of their mask's bounds."""
    box, mask = _inside(g.box, g.size), _inside(g.mask, g.size)
    lower, upper = np.maximum(box, mask)[:, :2], np.minimum(box, mask)[:, 2:]
    shared = np.prod(np.maximum(upper - lower, 0), axis=1)
    apart = np.abs(box - mask).max(1) > APART
    return (g.area > 0) & apart & (2 * shared < _area(box) + _area(mask) - shared)


# How other formats write a box, as x1, y1, x2, y2 from the four numbers of a "bbox".
_LAYOUTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "x, y, width, height": lambda b: np.concatenate([b[:, :2], b[:, :2] + b[:, 2:]], axis=1),
    "x1, y1, x2, y2": lambda b: b,
    "the centre, width, height": lambda b: np.concatenate(
        [b[:, :2] - b[:, 2:] / 2, b[:, :2] + b[:, 2:] / 2], axis=1
    ),
    "y, x, height, width": lambda b: np.concatenate(
        [b[:, 1::-1], b[:, 1::-1] + b[:, :1:-1]], axis=1
    ),
    "y1, x1, y2, x2": lambda b: b[:, [1, 0, 3, 2]],
}
_UNITS = {"pixels": None, "shares of 1": 1.0, "per cent": 100.0}


def readings(g: Geometry, misfits: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """What fits where box and mask do not: another reading of the box, or of the mask.

    Returns:
        Kinds of mistakes, and where each is, bool (n,).
    """
    found = []
    for unit, whole in _UNITS.items():
        factor = np.tile(g.size, 2) / whole if whole else 1.0
        if whole:
            fits = _same(g.mask * factor, g.box)
            found.append((f"mask that fits its box in {unit}, not in pixels", fits))
        for layout, bounds in _LAYOUTS.items():
            fits = _same(bounds(g.numbers * factor), g.mask)
            found.append((f"box that fits its mask as {layout} in {unit}", fits))
    return [(kind, misfits & fits) for kind, fits in found]


class Rule(NamedTuple):
    """What must not be.

    Attributes:
        kind: of the mistake.
        broken: which annotations break the rule, bool (n,).
    """

    kind: str
    broken: Callable[[Geometry], np.ndarray]


# A run would stop, or learn what is wrong. The first of them counts.
ERRORS = (
    Rule("polygon of numbers that are not finite", lambda g: ~np.isfinite(g.mask).all(1)),
    Rule(DAMAGED_MASK, lambda g: g.pixels != g.size.prod(1)),
    Rule("mask far outside of the image", lambda g: _far(g.mask, g.size)),
    Rule("box far outside of the image", lambda g: _far(g.box, g.size)),
    Rule(
        f"polygon longer than {LONGEST} times the sides of its image",
        lambda g: g.length > LONGEST * g.size.sum(1),
    ),
    Rule("box in shares of the image, not in pixels", _in_shares),
)
# It looks odd.
WARNINGS = (
    Rule("box that does not fit its mask", _misfits),
    Rule("box that lies more outside of the image than inside", _leaves),
)


def judge(g: Geometry) -> tuple[dict[int, str], dict[int, str]]:
    """The kinds of mistakes and of oddities of annotations, by their index; one for each."""
    errors = _first([(kind, broken(g)) for kind, broken in ERRORS])
    if (misfits := _misfits(g)).any():
        errors = _first(readings(g, misfits)) | errors
    warnings = _first([(kind, broken(g)) for kind, broken in WARNINGS])
    return errors, {index: kind for index, kind in warnings.items() if index not in errors}


def _first(broken: list[tuple[str, np.ndarray]]) -> dict[int, str]:
    """The first kind that each annotation breaks."""
    found: dict[int, str] = {}
    for kind, where in broken:
        for index in np.flatnonzero(where).tolist():
            found.setdefault(index, kind)
    return found
