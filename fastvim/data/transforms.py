"""From a PIL image to a normalised tensor: timm's transforms, with checked arguments.

C, H, W: channels, height and width of the tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from PIL import Image
from timm.data import create_transform
from timm.data.auto_augment import AugMixAugment, AutoAugment, RandAugment, posterize
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torchvision.transforms import Compose

from fastvim.data.pixels import PictureReader
from fastvim.errors import UserError, nearest

Transform = Callable[[Image.Image], torch.Tensor]

IMAGE_MODES = {1: "L", 3: "RGB"}  # PIL's mode for each number of channels
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
ERASING_MODES = ("const", "rand", "pixel")


def evaluation_transform(
    img_size: int | tuple[int, int] = 224,
    mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN,
    std: tuple[float, ...] = IMAGENET_DEFAULT_STD,
    crop_pct: float = 0.875,
    interpolation: str = "bicubic",
    in_chans: int = 3,
) -> Transform:
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
    if not 0 < crop_pct <= 1:
        raise UserError(f"crop_pct {crop_pct}: expected more than 0 and at most 1")
    settings = _common_settings(img_size, mean, std, interpolation, in_chans)
    return Compose(
        [to_mode(in_chans), create_transform(is_training=False, crop_pct=crop_pct, **settings)]
    )


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
) -> Transform:
    """Random resized crop, flips, RandAugment, normalisation, random erasing.

    The other arguments are those of `fastvim.data.images.ImageData`; the result and the errors are
    those of `evaluation_transform`.
    """
    if re_mode not in ERASING_MODES:
        raise UserError(f"re_mode {re_mode!r}: expected one of {', '.join(ERASING_MODES)}")
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
            re_prob=re_prob,
            re_mode=re_mode,
            **settings,
        )
    except (AssertionError, KeyError, ValueError) as error:  # how timm refuses a policy
        raise UserError(
            f"auto_augment {auto_augment!r}: expected a policy of timm, as rand-m9-mstd0.5-inc1"
        ) from error
    _fix_posterize(transform)
    return Compose([to_mode(in_chans), transform])


def _common_settings(
    img_size: int | tuple[int, int],
    mean: tuple[float, ...],
    std: tuple[float, ...],
    interpolation: str,
    in_chans: int,
) -> dict[str, Any]:
    """The arguments of timm's `create_transform` that training and evaluation share."""
    if in_chans not in IMAGE_MODES:
        raise UserError(f"in_chans {in_chans}: an image file has 1 channel (grey) or 3 (RGB)")
    if interpolation not in INTERPOLATIONS:
        raise UserError(
            f"interpolation {interpolation!r}: expected one of {', '.join(INTERPOLATIONS)}"
            + nearest(interpolation, INTERPOLATIONS)
        )
    return {
        "input_size": img_size if isinstance(img_size, int) else tuple(img_size),
        "interpolation": interpolation,
        "mean": per_channel("mean", mean, in_chans),
        "std": per_channel("std", std, in_chans),
    }


def per_channel(name: str, values: Sequence[float], in_chans: int) -> tuple[float, ...]:
    """One value for each channel, from as many or from one for all."""
    if len(values) not in (1, in_chans):
        raise UserError(
            f"{name} {list(values)}: expected 1 value or in_chans = {in_chans}, got {len(values)}"
        )
    return tuple(values) * (in_chans if len(values) == 1 else 1)


def to_mode(
    in_chans: int, value_range: tuple[float, float] | None = None
) -> Callable[[Image.Image], Image.Image]:
    """Makes a decoded image grey or RGB, as `PictureReader.convert` does; can be pickled."""
    reader = PictureReader(IMAGE_MODES[in_chans], value_range)
    return partial(reader.convert, name="image")


def _fix_posterize(transform: Compose) -> None:
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
                operation.aug_fn = _posterize


def _posterize(image: Image.Image, bits: int, **unused: object) -> Image.Image:
    return posterize(image, bits) if bits else Image.new(image.mode, image.size)
