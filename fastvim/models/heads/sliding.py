"""Inference on images of any size: sliding windows, and multi-scale and flip averaging."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from timm.layers import to_2tuple
from torch import Tensor

from fastvim.errors import OptionError


def sliding_window(
    model: Callable[[Tensor], Tensor],
    image: Tensor,
    window: int | tuple[int, int],
    stride: int | tuple[int, int],
) -> Tensor:
    """Logits of a model that is applied to one window at a time.

    The last window of a row or column is shifted back inside the image. An image smaller than the
    window is padded with zeros at the bottom and right.

    Args:
        model: from (B, C, height, width) of the window to logits (B, K, height, width).
        image: (B, C, height, width), any size.
        window: side in pixels, or (height, width).
        stride: pixels from one window to the next; at most the window.

    Returns:
        Logits (B, K, height, width), float32: the mean over the windows that hold a pixel.

    Raises:
        UserError: a stride below 1 or above the window.
    """
    windows, strides = to_2tuple(window), to_2tuple(stride)
    if not all(1 <= step <= side for step, side in zip(strides, windows, strict=True)):
        raise OptionError("stride", stride, f"at least 1 and at most the window {window}")
    height, width = image.shape[-2:]
    image = F.pad(image, (0, max(0, windows[1] - width), 0, max(0, windows[0] - height)))
    rows = _starts(image.shape[-2], windows[0], strides[0])
    columns = _starts(image.shape[-1], windows[1], strides[1])
    total: Tensor | None = None
    for row in rows:
        for column in columns:
            place = (..., slice(row, row + windows[0]), slice(column, column + windows[1]))
            logits = model(image[place]).float()
            if total is None:
                total = logits.new_zeros(*logits.shape[:2], *image.shape[-2:])
            total[place] += logits
    assert total is not None
    counts = _counts(image.shape[-2], rows, windows[0])[:, None]
    counts = counts * _counts(image.shape[-1], columns, windows[1])
    return (total / counts.to(total.device))[..., :height, :width]


def multi_scale_flip(
    predict: Callable[[Tensor], Tensor],
    image: Tensor,
    size: tuple[int, int],
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
) -> Tensor:
    """Log of the class probabilities averaged over scales and flips of an image.

    Args:
        predict: from an image (B, C, height, width) of any size to logits (B, K, height, width).
        image: (B, C, height, width).
        size: height and width (H, W) of the result; the logits of each scale are resized to it.
        scales: factors on the sides of the image.
        flip: also average over the mirror image of each scale.

    Returns:
        (B, K, H, W), float32: the logarithm of the mean probability.
    """
    total: Tensor | None = None
    for scale in scales:
        sides = tuple(max(1, math.floor(side * scale + 0.5)) for side in image.shape[-2:])
        version = _resize(image, sides)
        for mirrored in (False, True) if flip else (False,):
            logits = predict(version.flip(-1) if mirrored else version)
            if mirrored:
                logits = logits.flip(-1)
            one = _resize(logits.float(), size).log_softmax(dim=1)
            total = one if total is None else torch.logaddexp(total, one)
    assert total is not None
    return total - math.log(len(scales) * (2 if flip else 1))


def _resize(x: Tensor, size: tuple[int, ...]) -> Tensor:
    if x.shape[-2:] == size:
        return x
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


def _starts(size: int, window: int, stride: int) -> list[int]:
    """Where the windows along one axis begin; together they cover it."""
    return [*range(0, size - window, stride), size - window]


def _counts(size: int, starts: list[int], window: int) -> Tensor:
    """How many windows hold each place of one axis."""
    counts = torch.zeros(size)
    for start in starts:
        counts[start : start + window] += 1
    return counts
