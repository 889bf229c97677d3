"""Augmentation and normalisation of images with any number of channels.

C, H, W: channels, height and width. Every random number comes from torch's global generator, which
`fastvim.data.sampler` seeds for each sample.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import v2

from fastvim.errors import UserError

ChannelTransform = Callable[[Tensor], Tensor]

PLANE = (-2, -1)  # the axes of height and width


def evaluation_transform(
    img_size: int | tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
    *,
    min_size: int | None = None,
) -> ChannelTransform:
    """Pad, crop the centre and normalise.

    Args:
        img_size: height and width of the result in pixels, or one number for both.
        mean: of each channel, of the values as stored.
        std: as `mean`, more than 0.
        min_size: a smaller image is first padded with zeros around it to this height and width;
            `img_size` where that is larger or this is None.

    Returns:
        A picklable function from an image (C, H, W) to a float32 tensor (C, img_h, img_w). It
        raises UserError for an image with another number of channels than `mean` and `std` have.

    Raises:
        UserError: when an argument is outside what is listed above.
    """
    size = _pair(img_size)
    return v2.Compose(
        [*_read(size, min_size), v2.CenterCrop(size), Normalize.checked(mean, std)],
    )


def training_transform(
    img_size: int | tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
    *,
    min_size: int | None = None,
    rotate: bool = True,
    defocus: float = 0.5,
    defocus_radius: tuple[int, int] = (1, 3),
    dropout: float = 0.5,
    dropout_holes: int = 10,
    dropout_size: int = 10,
) -> ChannelTransform:
    """Pad, crop, flip or rotate, defocus, cut holes and normalise.

    The crop's place is random. Its orientation is one of six with equal probability: unchanged,
    flipped horizontally or vertically, rotated by 90, 180 or 270 degrees. Where `img_size` is not
    square, there are no rotations by 90 and 270 degrees.

    Args:
        rotate: False leaves out all rotations, not the flips.
        defocus: probability of blurring with a disk.
        defocus_radius: least and greatest radius of the disk in pixels, at least 1; whole numbers
            from one to the other are equally likely.
        dropout: probability of cutting holes: squares of stored value 0 in every channel.
        dropout_holes: greatest number of holes, at least 1; every number from 1 is equally likely.
        dropout_size: their height and width in pixels, at least 1 and at most `img_size`.

    The other arguments, the result and the errors are those of `evaluation_transform`.
    """
    size = _pair(img_size)
    _check_probability("defocus", defocus)
    _check_probability("dropout", dropout)
    steps = [*_read(size, min_size), v2.RandomCrop(size), _orientation(size, rotate)]
    if defocus:
        low, high = _range("defocus_radius", defocus_radius)
        steps.append(v2.RandomApply([Defocus(low, high)], defocus))
    if dropout:
        _check_least("dropout_holes", dropout_holes)
        _check_least("dropout_size", dropout_size)
        if dropout_size > min(size):
            raise UserError(f"dropout_size {dropout_size}: expected at most img_size {min(size)}")
        steps.append(v2.RandomApply([CoarseDropout(dropout_holes, dropout_size)], dropout))
    return v2.Compose([*steps, Normalize.checked(mean, std)])


@dataclass(frozen=True)
class Pad:
    """Zeros around an image (C, H, W) that is smaller than `height` or `width`.

    The image stays in the middle; an odd number puts one more at the bottom or right.
    """

    height: int
    width: int

    def __call__(self, image: Tensor) -> Tensor:
        rows = max(0, self.height - image.shape[-2])
        columns = max(0, self.width - image.shape[-1])
        if not rows and not columns:
            return image
        return F.pad(image, (columns // 2, (columns + 1) // 2, rows // 2, (rows + 1) // 2))


@dataclass(frozen=True)
class Defocus:
    """Blur an image (C, H, W) with a disk of random radius; the border repeats outside of it.

    Args:
        low: least radius in pixels.
        high: greatest radius.
    """

    low: int
    high: int

    def __call__(self, image: Tensor) -> Tensor:
        kernel = disk(int(torch.randint(self.low, self.high + 1, ())))
        reach = len(kernel) // 2
        padded = F.pad(image, (reach,) * 4, mode="replicate")
        # The channels are a batch of images of one channel: all get the same kernel.
        return F.conv2d(padded[:, None], kernel[None, None])[:, 0]


def disk(radius: int) -> Tensor:
    """A disk (K, K) with sum 1, K = 2 * radius + 1; its edge fades over one pixel."""
    offsets = torch.arange(-radius, radius + 1, dtype=torch.float32)
    distance = torch.hypot(offsets[:, None], offsets)
    kernel = (radius + 0.5 - distance).clamp(0, 1)
    return kernel / kernel.sum()


@dataclass(frozen=True)
class CoarseDropout:
    """Set 1 to `holes` squares of an image (C, H, W), drawn at random, to 0 in every channel.

    They lie wholly in the image and may overlap.

    Args:
        holes: greatest number of squares.
        size: their height and width in pixels.
    """

    holes: int
    size: int

    def __call__(self, image: Tensor) -> Tensor:
        height, width = image.shape[-2:]
        image = image.clone()  # it may be a view of the caller's
        for _ in range(int(torch.randint(1, self.holes + 1, ()))):
            top = int(torch.randint(0, height - self.size + 1, ()))
            left = int(torch.randint(0, width - self.size + 1, ()))
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
        if len(mean) != len(std):
            raise UserError(f"mean of {len(mean)} values, std of {len(std)}: expected as many")
        for value in std:
            if not value > 0:
                raise UserError(f"std {list(std)}: expected values above 0, got {value}")
        return cls(tuple(mean), tuple(std))

    def __call__(self, image: Tensor) -> Tensor:
        if len(image) != len(self.mean):
            raise UserError(
                f"mean and std of {len(self.mean)} values: the image has {len(image)} channels"
            )
        return v2.functional.normalize(image, list(self.mean), list(self.std))


def _read(size: tuple[int, int], min_size: int | None) -> list[ChannelTransform]:
    """To float32, and padded for a crop of `size`."""
    if min_size is not None:
        _check_least("min_size", min_size)
    height, width = (max(length, min_size or 0) for length in size)
    return [v2.ToDtype(torch.float32), Pad(height, width)]


def _orientation(size: tuple[int, int], rotate: bool) -> ChannelTransform:
    """One of the orientations that keep `size`, drawn with equal chance."""
    choices: list[ChannelTransform] = [v2.Identity()]
    choices += [v2.functional.horizontal_flip, v2.functional.vertical_flip]
    if rotate:
        turns = (1, 2, 3) if size[0] == size[1] else (2,)
        choices += [partial(torch.rot90, k=k, dims=PLANE) for k in turns]
    return v2.RandomChoice(choices)


def _pair(img_size: int | tuple[int, int]) -> tuple[int, int]:
    size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
    if len(size) != 2 or min(size) < 1:
        raise UserError(f"img_size {img_size}: expected a height and a width of 1 or more")
    return size


def _range(name: str, bounds: tuple[int, int]) -> tuple[int, int]:
    if len(bounds) != 2 or not 1 <= bounds[0] <= bounds[1]:
        raise UserError(f"{name} {list(bounds)}: expected two numbers of 1 or more, in order")
    return bounds


def _check_least(name: str, value: int) -> None:
    if value < 1:
        raise UserError(f"{name} {value}: expected 1 or more")


def _check_probability(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise UserError(f"{name} {value}: expected a probability in 0..1")
