"""Crops of images of any size, resized in two launches, of which parts of one size are kept.

An axis is resized at a time, the width first, each bit for bit as Pillow does: a new pixel is a sum
of old ones, with weights that are multiples of 2 ** -22. Between the two, values are rounded to 8
bits. Pillow resizes the height first where it finds that cheaper, and then differs by a level or
two in some pixels, more only beside edges as hard as noise has them: in crops of training, and in
evaluation's images that are more than twice as high as wide (`Planned.width_first`). Its "nearest"
now and then takes the pixel beside.

B: images of a batch; H, W: of an image as decoded; h, w: of the result; K: old pixels that a new
one is made of, at most; S: lines of an image that are resized, at most
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastvim.data.gpu.sending import send

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


def taps(
    lengths: Tensor,
    whole: Tensor,
    begin: Tensor,
    mirrored: Tensor,
    size: int,
    interpolation: str,
) -> Taps:
    """The taps of an axis.

    Args:
        lengths: float64 (B,), of the crops, in pixels.
        whole: float64 (B,), new pixels of the whole crops.
        begin: float64 (B,), the first of these that is kept.
        mirrored: bool (B,).
        size: of the result.
        interpolation: one of `FILTERS`, or "nearest".
    """
    place = begin[:, None] + torch.arange(size, dtype=torch.float64)
    place = torch.where(mirrored[:, None], whole[:, None] - 1 - place, place) + 0.5
    scale = (lengths / whole)[:, None]
    middle = place * scale
    if interpolation == "nearest":
        weights = torch.full((*middle.shape, 1), 1 << BITS, dtype=torch.int32)
        return Taps(middle.int(), weights)
    radius, weight = FILTERS[interpolation]
    wide = scale.clamp(min=1)
    reach = radius * wide
    first = (middle - reach + 0.5).clamp(min=0).int()
    end = torch.minimum((middle + reach + 0.5).int(), lengths[:, None].int())
    count = math.ceil(radius * max(float(scale.max()), 1)) * 2 + 1
    old = first[..., None] + torch.arange(count, dtype=torch.int32)
    shares = weight((old - middle[..., None] + 0.5) / wide[..., None])
    shares = torch.where(old < end[..., None], shares, 0.0)
    shares = shares / shares.sum(-1, keepdim=True) * (1 << BITS)
    return Taps(first, (shares + torch.where(shares < 0, -0.5, 0.5)).int())


class Windows(NamedTuple):
    """Where the crops lie in the images as decoded.

    Attributes:
        pixels: uint8, on the device: the images (H, W, 3), somewhere in it.
        begins: int64 (B,), of each image.
        sizes: int64 (B, 2), height and width of each.
        turned: bool (B,), whether the axes change places before all else.
        boxes: int64 (B, 4), top, left, height and width of a crop in pixels.
        whole: int64 (B, 2), height and width that a crop is resized to.
        begin: int64 (B, 2), of what is kept of that, from the end where it is mirrored.
        mirrored: bool (B, 2), whether the result is mirrored down, and across.
    """

    pixels: Tensor
    begins: np.ndarray
    sizes: np.ndarray
    turned: np.ndarray
    boxes: np.ndarray
    whole: np.ndarray
    begin: np.ndarray
    mirrored: np.ndarray

    def image(self, number: int) -> Tensor:
        """uint8 (3, H, W), of the pixels."""
        begin, (high, wide) = self.begins[number], self.sizes[number]
        whole = self.pixels[begin : begin + high * wide * 3]
        return whole.view(high, wide, 3).permute(2, 0, 1)


def crop_and_resize(
    windows: Windows, size: tuple[int, int], interpolation: str, device: torch.device
) -> Tensor:
    """Crops of the images, resized.

    Args:
        windows: of the images.
        size: height and width of the result.
        interpolation: as of `taps`.
        device: of the images.

    Returns:
        uint8 (B, 3, h, w).
    """
    if device.type == "cuda":
        return _resize_on_gpu(windows, size, interpolation, device)
    down, across = (_taps_along(axis, windows, size, interpolation) for axis in (0, 1))
    results = []
    for number, (top, left, height, width) in enumerate(windows.boxes):
        image = windows.image(number)
        part = image.mT if windows.turned[number] else image
        part = part[:, top : top + height, left : left + width]
        part = _resize_last(part, across.first[number], across.weights[number])
        results.append(_resize_last(part.mT, down.first[number], down.weights[number]).mT)
    return torch.stack(results)


def _taps_along(axis: int, windows: Windows, size: tuple[int, int], interpolation: str) -> Taps:
    known = (windows.boxes[:, 2:], windows.whole, windows.begin)
    lengths, whole, begin = (torch.from_numpy(each[:, axis]).double() for each in known)
    mirrored = torch.from_numpy(windows.mirrored[:, axis])
    return taps(lengths, whole, begin, mirrored, size[axis], interpolation)


def _resize_last(image: Tensor, first: Tensor, weights: Tensor) -> Tensor:
    """The last axis of an image, resized."""
    places = first[:, None] + torch.arange(weights.shape[1], dtype=torch.int32)
    old = image[..., places.clamp(max=image.shape[-1] - 1).long()].int()
    total = (old * weights).sum(-1, dtype=torch.int32) + (1 << (BITS - 1))
    return (total >> BITS).clamp(0, 255).to(torch.uint8)


def _resize_on_gpu(
    windows: Windows, size: tuple[int, int], interpolation: str, device: torch.device
) -> Tensor:
    from fastvim.data.gpu.kernels.crops import resize  # needs Triton

    line, step = windows.sizes[:, 1] * 3, np.full(len(windows.sizes), 3)
    line, step = np.where(windows.turned, (step, line), (line, step))
    top, left, height, width = windows.boxes.T
    address = windows.pixels.data_ptr() + windows.begins + top * line + left * step
    sizes = (width, height, *windows.mirrored.T[::-1], *windows.whole.T[::-1])
    rows = (address, np.ones_like(line), line, step, *sizes, *windows.begin.T[::-1])
    crops = send(torch.from_numpy(np.stack(rows, 1).astype(np.int64)), device)
    radius = 0.0 if interpolation == "nearest" else FILTERS[interpolation].radius
    scale = max(1.0, float((windows.boxes[:, 2:] / windows.whole).max()))
    return resize(crops, int(height.max()), scale, size, interpolation, radius, BITS)
