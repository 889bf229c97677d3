"""From a PIL image to a normalised tensor: timm's transforms, with checked arguments.

Loaders take the steps up to 8-bit pixels alone, and finish whole batches (`ImageTransform`).

C, H, W: channels, height and width of the tensor.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from PIL import Image
from timm.data import create_transform
from timm.data.auto_augment import AugMixAugment, AutoAugment, RandAugment, posterize
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torchvision.transforms import Compose

from fastvim.data.finishing import DrawErasing, Drawn, Finish
from fastvim.data.pixels import PictureReader
from fastvim.data.steps import in_fewer_calls, to_pixels
from fastvim.errors import OptionError
from fastvim.options import (
    COUNT,
    COUNT_OR_0,
    FINITE,
    NOT_NEGATIVE,
    POSITIVE,
    SHARE,
    SHARE_ABOVE_0,
    SIDE,
    Range,
    check,
    check_choice,
    check_pair,
    per_channel,
)

Transform = Callable[[Image.Image], torch.Tensor]
ToPixels = Callable[[Image.Image], torch.Tensor | Drawn]  # see `ImageTransform`

IMAGE_MODES = {1: "L", 3: "RGB"}  # PIL's mode for each number of channels
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
ERASING_MODES = ("const", "rand", "pixel")
POLICY = "a policy of timm, as rand-m9-mstd0.5-inc1"
# The sections of timm's policies. A magnitude above 10 would be taken for 10, or for `mmax`.
_SETS = ("tweights", "t3a", "t3aw")
_SWITCH, _MAGNITUDE = Range(0, 1, whole=True), Range(0, 10, whole=True)
_SECTIONS = {
    "rand": {
        "m": _MAGNITUDE,
        "n": COUNT,
        "p": SHARE,
        "mstd": NOT_NEGATIVE,
        "mmax": COUNT,
        "inc": _SWITCH,
    },
    "augmix": {
        "m": _MAGNITUDE,
        "w": COUNT,
        "d": COUNT,
        "a": POSITIVE,
        "b": _SWITCH,
        "mstd": NOT_NEGATIVE,
    },
}


class ImageTransform:
    """A picklable function from a PIL image to a float32 tensor (C, H, W), in two parts.

    Args:
        to_mode: makes an image grey or RGB.
        pixels: from such an image to its uint8 pixels (C, H, W), with what is to be erased in
            training.
        finish: from such pixels, of one image or a batch, to normalised ones, on any device.
    """

    def __init__(
        self, to_mode: Callable[[Image.Image], Image.Image], pixels: ToPixels, finish: Finish
    ) -> None:
        self.to_mode, self.pixels, self.finish = to_mode, pixels, finish

    def __call__(self, image: Image.Image) -> torch.Tensor:
        return self.finish(self.pixels(self.to_mode(image)))


def evaluation_transform(
    img_size: int | tuple[int, int] = 224,
    mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN,
    std: tuple[float, ...] = IMAGENET_DEFAULT_STD,
    crop_pct: float = 0.875,
    interpolation: str = "bicubic",
    in_chans: int = 3,
) -> ImageTransform:
    """Resize to `img_size / crop_pct`, crop the centre, scale to 0..1 and normalise.

    Args:
        img_size: height and width of the result in pixels, or one number for both.
        mean: per channel, of values in 0..1; a single value serves every channel.
        std: as `mean`.
        crop_pct: share of the resized image that the crop keeps along each axis, in (0, 1].
        interpolation: of the resizing; one of `INTERPOLATIONS`.
        in_chans: 1 (the image is made grey) or 3 (made RGB).

    Returns:
        A picklable function from a PIL image to a float32 tensor (C, H, W).

    Raises:
        UserError: when an argument is outside what is listed above.
    """
    check(SHARE_ABOVE_0, crop_pct=crop_pct)
    settings = _common_settings(img_size, mean, std, interpolation, in_chans)
    steps = create_transform(is_training=False, crop_pct=crop_pct, **settings)
    steps.transforms[-1] = to_pixels
    finish = Finish(settings["mean"], settings["std"])
    return ImageTransform(to_mode(in_chans), steps, finish)


def training_transform(
    img_size: int | tuple[int, int] = 224,
    mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN,
    std: tuple[float, ...] = IMAGENET_DEFAULT_STD,
    interpolation: str = "bicubic",
    in_chans: int = 3,
    *,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    hflip: float = 0.5,
    vflip: float = 0.0,
    color_jitter: float = 0.0,
    auto_augment: str | None = "rand-m9-mstd0.5-inc1",
    re_prob: float = 0.25,
    re_mode: str = "pixel",
) -> ImageTransform:
    """Random resized crop, flips, RandAugment, normalisation, random erasing.

    The other arguments are those of `fastvim.data.images.ImageData`; the result and the errors are
    those of `evaluation_transform`.
    """
    check_choice(ERASING_MODES, re_mode=re_mode)
    check_pair(SHARE_ABOVE_0, scale=scale)
    check_pair(POSITIVE, ratio=ratio)
    check(SHARE, hflip=hflip, vflip=vflip, re_prob=re_prob)
    check(NOT_NEGATIVE, color_jitter=color_jitter)
    if auto_augment and not _is_policy(auto_augment):
        raise OptionError("auto_augment", auto_augment, POLICY)
    settings = _common_settings(img_size, mean, std, interpolation, in_chans)
    try:
        transform = create_transform(
            is_training=True,
            scale=scale,
            ratio=ratio,
            hflip=hflip,
            vflip=vflip,
            color_jitter=color_jitter,
            auto_augment=auto_augment or None,
            **settings,
        )
    except (AssertionError, KeyError, ValueError) as error:  # how timm refuses a policy
        raise OptionError("auto_augment", auto_augment, POLICY) from error
    fix_posterize(transform)
    transform.transforms = [*map(in_fewer_calls, transform.transforms[:-1]), to_pixels]
    if re_prob:
        transform.transforms.append(DrawErasing(re_prob))
    finish = Finish(settings["mean"], settings["std"], re_mode)
    return ImageTransform(to_mode(in_chans), transform, finish)


def _common_settings(
    img_size: int | tuple[int, int],
    mean: tuple[float, ...],
    std: tuple[float, ...],
    interpolation: str,
    in_chans: int,
) -> dict[str, Any]:
    """The arguments of timm's `create_transform` that training and evaluation share."""
    if in_chans not in IMAGE_MODES:
        raise OptionError("in_chans", in_chans, "1 (grey) or 3 (RGB), as image files have")
    check_choice(INTERPOLATIONS, interpolation=interpolation)
    check(SIDE, img_size=img_size)
    return {
        "input_size": img_size if isinstance(img_size, int) else tuple(img_size),
        "interpolation": interpolation,
        "mean": per_channel("mean", mean, in_chans, FINITE),
        "std": per_channel("std", std, in_chans, POSITIVE),
        "use_prefetcher": True,  # the last step makes a tensor and no more
    }


def _is_policy(description: str) -> bool:
    """Whether timm takes every section of a policy's description: it passes over odd ones."""
    kind, *sections = description.split("-")
    numbers: dict[str, float] = {}
    for section in sections:
        found = re.fullmatch(r"([a-z]+)(\d+(?:\.\d+)?)", section)
        if found is not None:
            numbers[found[1]] = float(found[2]) if "." in found[2] else int(found[2])
        elif kind != "rand" or section not in _SETS:
            return False
    ranges = dict(_SECTIONS.get(kind, {"mstd": NOT_NEGATIVE}))
    if "mmax" in numbers:
        ranges["m"] = COUNT_OR_0
    return all(key in ranges and number in ranges[key] for key, number in numbers.items())


def to_mode(
    in_chans: int, value_range: tuple[float, float] | None = None
) -> Callable[[Image.Image], Image.Image]:
    """Makes a decoded image grey or RGB, as `PictureReader.convert` does; can be pickled."""
    reader = PictureReader(IMAGE_MODES[in_chans], value_range)
    return partial(reader.convert, name="image")


def fix_posterize(transform: Compose) -> None:
    """Let posterisation to 0 bits give a black image, as Pillow did before version 13.

    RandAugment at its top magnitude asks for 0 bits (about one image in 700 under the default
    policy); Pillow now raises ValueError there, which would end the run.
    """
    for step in transform.transforms:
        if isinstance(step, AutoAugment):
            operations = [operation for policy in step.policy for operation in policy]
        else:
            operations = step.ops if isinstance(step, RandAugment | AugMixAugment) else []
        for operation in operations:
            if operation.aug_fn is posterize:
                operation.aug_fn = posterize_to_black


def posterize_to_black(image: Image.Image, bits: int, **unused: object) -> Image.Image:
    return posterize(image, bits) if bits else Image.new(image.mode, image.size)
