"""An augmentation that is drawn in a loading process and done elsewhere.

timm's steps, and ours, are called with a picture that has a size but no pixels. They draw what they
always draw, and the picture notes what they ask for: one description serves both ways.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from timm.data import auto_augment
from timm.data.auto_augment import AutoAugment, RandAugment
from timm.data.transforms import ResizeKeepRatio
from torchvision.transforms import CenterCrop, ColorJitter, Compose, Resize

from fastvim.data.finishing import NOWHERE, DrawErasing
from fastvim.data.steps import Crop, Flip, to_pixels
from fastvim.data.transforms import posterize_to_black

# What is done to pixels. An affine map reads from a place of the image for each new pixel; a table
# gives a new value for each of 256; the last two blend with a grey and with a smoothed image.
KINDS = (
    *("affine", "autocontrast", "equalize", "invert", "posterize", "solarize", "solarize_add"),
    *("brightness", "contrast", "colour", "sharpness"),
)
NUMBERS = 11  # of an operation: its kind, then those of `Operation`
NOTHING = -1  # the kind of none


class Operation(NamedTuple):
    """One operation of an augmentation.

    Attributes:
        kind: one of `KINDS`.
        values: of an affine map the six of Pillow's matrix, whether it is bicubic and not bilinear,
            and the colour of what lies outside; else the strength, or none.
    """

    kind: str
    values: tuple[float, ...] = ()


class Planned(Image.Image):
    """A picture without pixels, which notes what is done to it.

    Args:
        size: width and height.

    Attributes:
        box: left, top, right and bottom of the crop, which is resized.
        whole: width and height that it is resized to.
        begin: left and top of what is kept of that: `size` pixels.
        across, down: whether the result is mirrored.
        operations: what follows, in order.
        erased: as `Drawn` has it.
    """

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__()
        self._mode, self._size = "RGB", size
        self.box = (0, 0, *size)
        self.whole, self.begin = size, (0, 0)
        self._resized = False
        self.across = self.down = False
        self.operations: list[Operation] = []
        self.erased = NOWHERE

    @property
    def width_first(self) -> bool:
        """Whether Pillow surely resizes the width first, as `crops` does.

        From version 13 on it begins with the height where that takes away more than twice as many
        lines as the width loses columns. Earlier ones never do.
        """
        left, top, right, bottom = self.box
        lost = bottom - top - self.whole[1]
        return lost <= 0 or lost <= 2 * (right - left - self.whole[0])

    def crop(self, box: Any = None) -> Planned:
        """Before it is resized, and after that."""
        left, top, right, bottom = box
        self._size = right - left, bottom - top
        if self._resized:
            self.begin = left, top
        else:
            self.box, self.whole = box, self._size
        return self

    def resize(self, size: Any, *_: Any, **__: Any) -> Planned:
        assert not self._resized
        self._size = self.whole = size
        self._resized = True
        return self

    def transpose(self, method: Image.Transpose) -> Planned:
        if method == Image.Transpose.FLIP_LEFT_RIGHT:
            self.across = not self.across
        else:
            self.down = not self.down
        return self

    def transform(self, size: Any, method: Any, data: Any = None, *_: Any, **how: Any) -> Planned:
        bicubic = how["resample"] == Image.Resampling.BICUBIC
        values = (*map(float, data), float(bicubic), *map(float, how["fillcolor"]))
        self.operations.append(Operation("affine", values))
        return self

    def rotate(self, angle: float, *_: Any, **how: Any) -> Planned:
        """About the middle, as Pillow does."""
        turn = -math.radians(angle % 360.0)
        cos, sin = round(math.cos(turn), 15), round(math.sin(turn), 15)
        x, y = self._size[0] / 2, self._size[1] / 2
        matrix = (cos, sin, x - cos * x - sin * y, -sin, cos, y + sin * x - cos * y)
        return self.transform(self._size, Image.Transform.AFFINE, matrix, **how)

    def add(self, kind: str, *values: float) -> Planned:
        """Note an operation of pixels."""
        self.operations.append(Operation(kind, values))
        return self


def _noted(kind: str) -> Callable[..., Planned]:
    def note(image: Planned, *values: float, **_: Any) -> Planned:
        return image.add(kind, *values)

    return note


def _desaturate(image: Planned, factor: float, **_: Any) -> Planned:
    return image.add("colour", min(1.0, max(0.0, 1.0 - factor)))


_WAYS = {Image.Resampling.BILINEAR, Image.Resampling.BICUBIC}
# Geometric operations of timm ask the picture itself.
_NOTED: dict[Any, Callable[..., Planned]] = {
    auto_augment.auto_contrast: _noted("autocontrast"),
    auto_augment.equalize: _noted("equalize"),
    auto_augment.invert: _noted("invert"),
    auto_augment.posterize: _noted("posterize"),
    posterize_to_black: _noted("posterize"),
    auto_augment.solarize: _noted("solarize"),
    auto_augment.solarize_add: _noted("solarize_add"),
    auto_augment.brightness: _noted("brightness"),
    auto_augment.contrast: _noted("contrast"),
    auto_augment.color: _noted("colour"),
    auto_augment.desaturate: _desaturate,
    auto_augment.sharpness: _noted("sharpness"),
    **{
        step: step
        for step in (
            *(auto_augment.rotate, auto_augment.shear_x, auto_augment.shear_y),
            *(auto_augment.translate_x_abs, auto_augment.translate_y_abs),
            *(auto_augment.translate_x_rel, auto_augment.translate_y_rel),
        )
    },
}


class _Jitter:
    def __init__(self, step: ColorJitter) -> None:
        self.step = step

    def __call__(self, image: Planned) -> Planned:
        step = self.step
        order, *strengths = ColorJitter.get_params(
            step.brightness, step.contrast, step.saturation, step.hue
        )
        names = ("brightness", "contrast", "colour", "hue")
        for number in order.tolist():
            if strengths[number] is not None:
                image.add(names[number], strengths[number])
        return image


class _Erase:
    def __init__(self, step: DrawErasing) -> None:
        self.step = step

    def __call__(self, image: Planned) -> Planned:
        image.erased = self.step.draw(*image.size[::-1])
        return image


@lru_cache(maxsize=16)
def planned(transform: Any) -> Compose | None:
    """The steps of a transform for a `Planned` picture.

    Args:
        transform: the `pixels` of an `ImageTransform`.

    Returns:
        None where a step is another one than those that a batch can be given: AugMix, blurring.
    """
    steps: list[Callable[[Any], Any]] = []
    for step in transform.transforms:
        if isinstance(step, Crop | Flip | Resize | ResizeKeepRatio | CenterCrop):
            steps.append(step)
        elif isinstance(step, ColorJitter) and step.hue is None:
            steps.append(_Jitter(step))
        elif isinstance(step, DrawErasing):
            steps.append(_Erase(step))
        elif isinstance(step, AutoAugment | RandAugment):
            step = copy.deepcopy(step)
            for operation in _operations(step):
                if operation.aug_fn not in _NOTED or not _WAYS.issuperset(_ways(operation)):
                    return None
                operation.aug_fn = _NOTED[operation.aug_fn]
            steps.append(step)
        elif step is not to_pixels:
            return None
    return Compose(steps)


def size_and_filter(transform: Any) -> tuple[tuple[int, int], str]:
    """Height and width of what a transform gives, and how it resizes.

    Args:
        transform: that can be `planned`.
    """
    size, interpolation = (0, 0), ""
    for step in transform.transforms:
        if isinstance(step, Crop | CenterCrop):
            size = tuple(step.size)
        if isinstance(step, Crop):
            interpolation = step.resample.name.lower()
        elif isinstance(step, Resize | ResizeKeepRatio):
            way: Any = step.interpolation  # torchvision's
            interpolation = way.value
    return size, interpolation


def _ways(operation: Any) -> tuple[Any, ...]:
    """How an operation of timm may interpolate."""
    way = operation.kwargs.get("resample", ())
    return tuple(way) if isinstance(way, tuple | list) else (way,)


def _operations(step: AutoAugment | RandAugment) -> list[Any]:
    if isinstance(step, RandAugment):
        return list(step.ops)
    return [operation for policy in step.policy for operation in policy]


def numbered(operations: list[list[Operation]]) -> np.ndarray:
    """The operations of a batch: float64 (B, most of an image, `NUMBERS`)."""
    numbers = np.zeros((len(operations), max(map(len, operations), default=0), NUMBERS))
    numbers[..., 0] = NOTHING
    for row, some in zip(numbers, operations, strict=True):
        for place, operation in zip(row, some, strict=False):
            place[0] = KINDS.index(operation.kind)
            place[1 : 1 + len(operation.values)] = operation.values
    return numbers
