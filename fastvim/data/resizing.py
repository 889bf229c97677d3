"""Sizes of images, and two ways to resize them: with antialiasing, and as OpenCV does.

H W C  rows, columns and channels of an image
"""

from __future__ import annotations

import math

import numpy as np
from PIL import Image

Window = tuple[int, int, int, int]  # left, top, right and bottom in the resized image

_ONE = 2048  # a weight of 1: OpenCV's have 11 bits
_BAND = 16  # rows at a time, so that sums stay in the cache


def fit(size: tuple[int, int], bounds: tuple[float, float]) -> tuple[int, int]:
    """The largest size of the same shape whose longer and shorter sides are within `bounds`."""
    factor = min(max(bounds) / max(size), min(bounds) / min(size))
    return max(1, math.floor(size[0] * factor + 0.5)), max(1, math.floor(size[1] * factor + 0.5))


def resize(
    image: Image.Image, size: tuple[int, int], antialias: bool = True, window: Window | None = None
) -> Image.Image:
    """An image at another size (width, height), by bilinear interpolation.

    Args:
        image: 8 bits per channel.
        size: of the whole result.
        antialias: average over all pixels that a smaller image covers, as Pillow does; False takes
            the nearest four alone, as OpenCV does.
        window: the part of the result to compute; None for all of it.
    """
    if not antialias:
        return Image.fromarray(linear(np.asarray(image), size, window))
    if window is None:
        return image.resize(size, Image.Resampling.BILINEAR)
    across, down = image.width / size[0], image.height / size[1]
    left, top, right, bottom = window
    box = left * across, top * down, right * across, bottom * down
    box = *box[:2], min(box[2], image.width), min(box[3], image.height)
    return image.resize((right - left, bottom - top), Image.Resampling.BILINEAR, box)


def nearest(
    pixels: np.ndarray, size: tuple[int, int], centred: bool = True, window: Window | None = None
) -> np.ndarray:
    """Labels or masks at another size: each pixel takes one of the stored ones.

    Args:
        pixels: (H, W, ...).
        size: width and height of the whole result.
        centred: the one under the middle of the new pixel, as Pillow does; False takes the one
            under its corner, as OpenCV does.
        window: the part of the result to compute; None for all of it.
    """
    left, top, right, bottom = window or (0, 0, *size)
    half = 0.5 if centred else 0.0
    rows, columns = (
        # OpenCV's way to the ratio, which decides at the edge between two pixels.
        ((np.arange(start, end) + half) * (1 / (wanted / stored)))
        .astype(np.int64)
        .clip(0, stored - 1)
        for start, end, stored, wanted in (
            (top, bottom, pixels.shape[0], size[1]),
            (left, right, pixels.shape[1], size[0]),
        )
    )
    return pixels[rows][:, columns]


def linear(pixels: np.ndarray, size: tuple[int, int], window: Window | None = None) -> np.ndarray:
    """Bilinear interpolation between four pixels, bit for bit OpenCV's `INTER_LINEAR` of 8 bits.

    Args:
        pixels: uint8 (H, W) or (H, W, C).
        size: width and height of the whole result.
        window: the part of the result to compute; None for all of it.

    Returns:
        uint8 (height, width) or (height, width, C) of the window.
    """
    height, width = pixels.shape[:2]
    start_x, start_y, end_x, end_y = window or (0, 0, *size)
    if size == (width, height):
        return pixels[start_y:end_y, start_x:end_x]
    left, share = _positions(width, size[0], start_x, end_x)
    share[(left < 0) | (left >= width - 1)] = 0
    left = left.clip(0, width - 1)
    top, share_below = _positions(height, size[1], start_y, end_y)
    above, below = top.clip(0, height - 1), (top + 1).clip(0, height - 1)

    right = (left + 1).clip(0, width - 1)
    channels = (1,) * (pixels.ndim - 2)
    across = [weight.reshape(-1, *channels) for weight in _weights(share)]
    down = [weight.reshape(-1, 1, *channels) for weight in _weights(share_below)]
    result = np.empty((len(top), len(left), *pixels.shape[2:]), dtype=np.uint8)
    for start in range(0, len(top), _BAND):
        band = slice(start, start + _BAND)
        rows, places = np.unique(np.concatenate([above[band], below[band]]), return_inverse=True)
        used = pixels[rows]
        # int32, as the weights.
        sums = used.take(left, axis=1) * across[0] + used.take(right, axis=1) * across[1] >> 4
        upper, lower = (
            sums[part] * weight[band] >> 16
            for part, weight in zip(np.split(places, 2), down, strict=True)
        )
        result[band] = upper + lower + 2 >> 2
    return result


def _positions(stored: int, wanted: int, start: int, end: int) -> tuple[np.ndarray, np.ndarray]:
    """Of the wanted pixels from start to end: the pixel before its middle, and how far before."""
    positions = ((np.arange(start, end) + 0.5) * (stored / wanted) - 0.5).astype(np.float32)
    before = np.floor(positions)
    return before.astype(np.int64), positions - before


def _weights(share: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of the pixels before and behind, int32."""
    before, behind = (np.rint(_ONE * part).astype(np.int32) for part in (1 - share, share))
    return before, behind
