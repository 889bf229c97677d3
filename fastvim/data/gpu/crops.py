"""Crops of images of any size, resized to one size in two launches.

An axis is resized at a time, the width first, each bit for bit as Pillow does: a new pixel is a sum
of old ones, with weights that are multiples of 2 ** -22. Between the two, values are rounded to 8
bits. Pillow resizes the height first where it finds that cheaper, and then differs by a level or
two in some pixels, more only beside edges as hard as noise has them.

B: images of a batch; H, W: of an image as decoded; h, w: of the result; K: old pixels that a new
one is made of, at most; S: lines of an image that are resized, at most
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

BITS = 22  # of a weight behind the point


class Filter(NamedTuple):
    """How far from a new pixel's middle old ones count, in pixels of the coarser image, and how."""

    radius: float
    weight: Callable[[Tensor], Tensor]


def _bicubic(x: Tensor) -> Tensor:
    x, a = x.abs(), -0.5
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return torch.where(x < 1, near, torch.where(x < 2, far, 0.0))


def _hamming(x: Tensor) -> Tensor:
    x = x.abs()
    window = 0.54 + 0.46 * torch.cos(math.pi * x)
    return torch.where(x < 1, torch.sinc(x) * window, 0.0)


FILTERS = {
    "box": Filter(0.5, lambda x: ((x > -0.5) & (x <= 0.5)).double()),
    "bilinear": Filter(1.0, lambda x: (1 - x.abs()).clamp(min=0)),
    "hamming": Filter(1.0, _hamming),
    "bicubic": Filter(2.0, _bicubic),
    "lanczos": Filter(
        3.0, lambda x: torch.where(x.abs() < 3, torch.sinc(x) * torch.sinc(x / 3), 0.0)
    ),
}


class Taps(NamedTuple):
    """What the new pixels of an axis are made of.

    Attributes:
        first: int32 (B, size), the first old pixel of each, counted from the crop's begin.
        weights: int32 (B, size, K), of that and those that follow.
    """

    first: Tensor
    weights: Tensor


def taps(lengths: Tensor, mirrored: Tensor, size: int, interpolation: str) -> Taps:
    """The taps of an axis.

    Args:
        lengths: float64 (B,), of the crops, in pixels.
        mirrored: bool (B,).
        size: of the result.
        interpolation: one of `FILTERS`, or "nearest".
    """
    place = torch.arange(size, dtype=torch.float64)
    place = torch.where(mirrored[:, None], size - 1 - place, place) + 0.5
    scale = (lengths / size)[:, None]
    middle = place * scale
    if interpolation == "nearest":
        weights = torch.full((*middle.shape, 1), 1 << BITS, dtype=torch.int32)
        return Taps(middle.int(), weights)
    radius, weight = FILTERS[interpolation]
    wide = scale.clamp(min=1)
    reach = radius * wide
    begin = (middle - reach + 0.5).clamp(min=0).int()
    end = torch.minimum((middle + reach + 0.5).int(), lengths[:, None].int())
    count = math.ceil(radius * max(float(scale.max()), 1)) * 2 + 1
    old = begin[..., None] + torch.arange(count, dtype=torch.int32)
    shares = weight((old - middle[..., None] + 0.5) / wide[..., None])
    shares = torch.where(old < end[..., None], shares, 0.0)
    shares = shares / shares.sum(-1, keepdim=True) * (1 << BITS)
    return Taps(begin, (shares + torch.where(shares < 0, -0.5, 0.5)).int())


class Windows(NamedTuple):
    """Where the crops lie in the images as decoded.

    Attributes:
        images: uint8 (3, H, W), with any strides.
        top, left, height, width: of each crop, in pixels.
        down, across: whether it is mirrored.
    """

    images: list[Tensor]
    top: list[int]
    left: list[int]
    height: list[int]
    width: list[int]
    down: list[bool]
    across: list[bool]


def crop_and_resize(windows: Windows, size: tuple[int, int], interpolation: str) -> Tensor:
    """Crops of the images, resized.

    Args:
        windows: of the images.
        size: height and width of the result.
        interpolation: as of `taps`.

    Returns:
        uint8 (B, 3, h, w).
    """
    if windows.images[0].device.type == "cuda":
        return _resize_on_gpu(windows, size, interpolation)
    lengths = torch.tensor([windows.height, windows.width], dtype=torch.float64)
    mirrored = torch.tensor([windows.down, windows.across])
    down = taps(lengths[0], mirrored[0], size[0], interpolation)
    across = taps(lengths[1], mirrored[1], size[1], interpolation)
    results = []
    for number, image in enumerate(windows.images):
        _, top, left, height, width, *_ = (field[number] for field in windows)
        part = image[:, top : top + height, left : left + width]
        part = _resize_last(part, across.first[number], across.weights[number])
        results.append(_resize_last(part.mT, down.first[number], down.weights[number]).mT)
    return torch.stack(results)


def _resize_last(image: Tensor, first: Tensor, weights: Tensor) -> Tensor:
    """The last axis of an image, resized."""
    places = first[:, None] + torch.arange(weights.shape[1], dtype=torch.int32)
    old = image[..., places.clamp(max=image.shape[-1] - 1).long()].int()
    total = (old * weights).sum(-1, dtype=torch.int32) + (1 << (BITS - 1))
    return (total >> BITS).clamp(0, 255).to(torch.uint8)


def _resize_on_gpu(windows: Windows, size: tuple[int, int], interpolation: str) -> Tensor:
    from fastvim.data.gpu.crop_kernel import resize  # needs Triton

    rows = []
    for image, top, left, height, width, down, across in zip(*windows, strict=True):
        channel, line, step = image.stride()
        begin = image.data_ptr() + top * line + left * step
        rows.append((begin, channel, line, step, width, height, across, down))
    crops = torch.tensor(rows, dtype=torch.int64)
    if (device := windows.images[0].device).type == "cuda":
        crops = crops.pin_memory().to(device, non_blocking=True)
    radius = 0.0 if interpolation == "nearest" else FILTERS[interpolation].radius
    longest = max(windows.height), max(windows.width)
    return resize(crops, longest, size, interpolation, radius, BITS)
