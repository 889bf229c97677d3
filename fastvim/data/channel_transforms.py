"""Augmentation and normalisation of images with any number of channels.

C, H, W: channels, height and width. Images are float32, or uint8 and then stay whole numbers up to
the normalisation, as published: what is interpolated is rounded. Every random number comes from
torch's global generator, which `fastvim.data.sampler` seeds for each sample.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import v2

from fastvim.errors import OptionError, UserError
from fastvim.options import (
    COUNT,
    FINITE,
    POSITIVE,
    SHARE,
    SIDE,
    SIZE,
    check,
    check_choice,
    check_given,
)

ChannelTransform = Callable[[Tensor], Tensor]
Rotation = Literal["any", "quarter", "none"]

PLANE = (-2, -1)  # the axes of height and width
LIMITS = (90, 180, 270)  # degrees; each is a choice of its own, as likely as a flip
RADII = (1, 2, 3)  # pixels, of the disk of a defocus
SMOOTHING = (0.1, 0.5)  # pixels: least and greatest deviation of the Gaussian that smooths it


def evaluation_transform(
    img_size: int | tuple[int, int], mean: Sequence[float], std: Sequence[float]
) -> ChannelTransform:
    """Normalise; an image of another size than `img_size` is first padded or cropped to it.

    The image stays in the middle, among zeros where it is smaller.

    Args:
        img_size: height and width of the result in pixels, or one number for both.
        mean: of each channel, of the values as stored.
        std: as `mean`, more than 0.

    Returns:
        A picklable function from an image (C, H, W) to a float32 tensor (C, img_h, img_w). It
        raises UserError for an image with another number of channels than `mean` and `std` have.

    Raises:
        UserError: when an argument is outside what is listed above.
    """
    size = _pair(img_size)
    return v2.Compose([Pad(*size), v2.CenterCrop(size), Normalize.checked(mean, std)])


def training_transform(
    img_size: int | tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
    *,
    min_size: int | None = None,
    orientation: float = 0.5,
    rotation: Rotation = "any",
    defocus: float = 0.5,
    dropout: float = 0.5,
    dropout_holes: int = 10,
    dropout_size: int = 10,
) -> ChannelTransform:
    """Pad, crop, flip or rotate, defocus, cut holes and normalise: as published for cells.

    Args:
        min_size: a smaller image is first padded with zeros to this height and width, at a random
            place; `img_size` where that is larger or this is None. The crop's place is random too.
        orientation: probability of another orientation: a horizontal flip, a vertical flip or one
            of three rotations, with equal chance.
        rotation: "any" angle within 90, 180 or 270 degrees to either side (`Rotate`); "quarter":
            exactly 90, 180 or 270 degrees, which moves pixels and mixes none, and 180 alone where
            `img_size` is not square; "none": flips alone.
        defocus: probability of blurring with a disk (`Defocus`).
        dropout: probability of cutting holes: squares of stored value 0 in every channel.
        dropout_holes: their number, at least 1; they may overlap.
        dropout_size: their height and width in pixels, at least 1 and at most `img_size`.

    The other arguments, the result and the errors are those of `evaluation_transform`.
    """
    size = _pair(img_size)
    check_given(COUNT, min_size=min_size)
    check(SHARE, orientation=orientation, defocus=defocus, dropout=dropout)
    check_choice(get_args(Rotation), rotation=rotation)
    check(SIZE, dropout_holes=dropout_holes, dropout_size=dropout_size)
    height, width = (max(length, min_size or 0) for length in size)
    steps = [Pad(height, width, random=True), v2.RandomCrop(size)]
    if orientation:
        steps.append(v2.RandomApply([_orientation(size, rotation)], orientation))
    if defocus:
        least = max(RADII) + 2  # of its disk's reach is mirrored
        if min(size) < least:
            expected = f"0, as img_size {min(size)} is less than {least}"
            raise OptionError("defocus", defocus, expected)
        steps.append(v2.RandomApply([Defocus()], defocus))
    if dropout:
        if dropout_size > min(size):
            raise OptionError("dropout_size", dropout_size, f"at most img_size {min(size)}")
        steps.append(v2.RandomApply([CoarseDropout(dropout_holes, dropout_size)], dropout))
    return v2.Compose([*steps, Normalize.checked(mean, std)])


@dataclass(frozen=True)
class Pad:
    """Zeros around an image (C, H, W) that is smaller than `height` or `width`.

    The image stays in the middle, where an odd number puts one more at the bottom or right, or
    goes to a `random` place, every one of them equally likely.
    """

    height: int
    width: int
    random: bool = False

    def __call__(self, image: Tensor) -> Tensor:
        rows = max(0, self.height - image.shape[-2])
        columns = max(0, self.width - image.shape[-1])
        if not rows and not columns:
            return image
        top, left = (
            int(torch.randint(spare + 1, ())) if self.random else spare // 2
            for spare in (rows, columns)
        )
        return F.pad(image, (left, columns - left, top, rows - top))


@dataclass(frozen=True)
class Rotate:
    """Rotate an image (C, H, W) by an angle drawn uniformly from within `limit` degrees."""

    limit: float

    def __call__(self, image: Tensor) -> Tensor:
        return rotate(image, self.limit * (2 * float(torch.rand(())) - 1))


def rotate(image: Tensor, degrees: float) -> Tensor:
    """An image (C, H, W) turned counterclockwise about its middle, of the same size.

    Bilinear; beyond the outermost pixels it is mirrored without repeating them.
    """
    channels, height, width = image.shape
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    # Coordinates run from -1 to 1 between the centres of the outermost pixels, along either axis.
    aspect = max(height - 1, 1) / max(width - 1, 1)
    turn = torch.tensor([[cosine, -sine * aspect, 0.0], [sine / aspect, cosine, 0.0]])
    places = F.affine_grid(turn[None], [1, channels, height, width], align_corners=True)
    turned = F.grid_sample(
        image[None].float(), places, mode="bilinear", padding_mode="reflection", align_corners=True
    )
    return _as_stored(turned[0], image)


@dataclass(frozen=True)
class Defocus:
    """Blur an image (C, H, W) with a disk: radius and smoothing are drawn, the border is mirrored.

    The outermost pixels are not repeated.
    """

    def __call__(self, image: Tensor) -> Tensor:
        radius = RADII[int(torch.randint(len(RADII), ()))]
        kernel = disk(radius, float(torch.empty(()).uniform_(*SMOOTHING)))
        # Channels last, oneDNN neither copies nor pads them: a fraction of the time and memory.
        batch = image[None].to(torch.float32, memory_format=torch.channels_last)
        padded = F.pad(batch, (len(kernel) // 2,) * 4, mode="reflect")
        kernels = kernel.expand(len(image), 1, *kernel.shape)
        return _as_stored(F.conv2d(padded, kernels, groups=len(image))[0], image)


def disk(radius: int, deviation: float) -> Tensor:
    """An even disk (K, K) with sum 1, K = 2 * radius + 3, smoothed by a Gaussian of three taps."""
    offsets = torch.arange(-radius - 1, radius + 2)
    inside = (offsets[:, None].square() + offsets.square() <= radius**2).float()
    taps = torch.exp(-0.5 * (torch.arange(-1, 2) / deviation).square())
    taps /= taps.sum()
    smoothed = F.conv2d(inside[None, None], taps.outer(taps)[None, None], padding=1)
    return smoothed[0, 0] / inside.sum()


@dataclass(frozen=True)
class CoarseDropout:
    """Set squares of an image (C, H, W), drawn at random, to 0 in every channel.

    They lie wholly in the image and may overlap.

    Args:
        holes: how many.
        size: their height and width in pixels.
    """

    holes: int
    size: int

    def __call__(self, image: Tensor) -> Tensor:
        height, width = image.shape[-2:]
        image = image.clone()  # it may be a view of the caller's
        tops = torch.randint(height - self.size + 1, (self.holes,)).tolist()
        lefts = torch.randint(width - self.size + 1, (self.holes,)).tolist()
        for top, left in zip(tops, lefts, strict=True):
            image[:, top : top + self.size, left : left + self.size] = 0
        return image


@dataclass(frozen=True)
class Normalize:
    """Subtract the mean of each channel of an image (C, H, W) and divide by the deviation."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def checked(cls, mean: Sequence[float], std: Sequence[float]) -> Normalize:
        """The transform, or a UserError for values that do not fit."""
        check(FINITE, mean=mean)
        check(POSITIVE, std=std)
        if len(mean) != len(std):
            raise UserError(f"mean of {len(mean)} values, std of {len(std)}: expected as many")
        return cls(tuple(mean), tuple(std))

    def __call__(self, image: Tensor) -> Tensor:
        if len(image) != len(self.mean):
            raise UserError(
                f"mean and std of {len(self.mean)} values: the image has {len(image)} channels"
            )
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.mean, self.std))
        return (image - mean).div_(std)


def _orientation(size: tuple[int, int], rotation: Rotation) -> ChannelTransform:
    """Another orientation that keeps `size`, each choice with equal chance."""
    choices: list[ChannelTransform] = [v2.functional.horizontal_flip, v2.functional.vertical_flip]
    if rotation == "any":
        choices += [Rotate(limit) for limit in LIMITS]
    elif rotation == "quarter":
        turns = (1, 2, 3) if size[0] == size[1] else (2,)
        choices += [partial(torch.rot90, k=k, dims=PLANE) for k in turns]
    return v2.RandomChoice(choices)


def _as_stored(result: Tensor, image: Tensor) -> Tensor:
    """What was computed of an image, in the image's type: whole numbers are rounded."""
    if not image.is_floating_point():
        result = result.round_().to(image.dtype)
    return result.contiguous()


def _pair(img_size: int | tuple[int, int]) -> tuple[int, int]:
    check(SIDE, img_size=img_size)
    size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
    if len(size) != 2:
        raise OptionError("img_size", img_size, "a height and a width")
    return size
