"""Helpers of the segmentation and detection data: sizes, files, random numbers."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from PIL import Image

from fastvim.data.files import UNREADABLE, UnreadableImageError

MISSING_IMAGE = "missing image file"  # a kind of `UnreadableImageError`


def fit(size: tuple[int, int], bounds: tuple[float, float]) -> tuple[int, int]:
    """The largest size of the same shape whose longer and shorter sides are within `bounds`."""
    factor = min(max(bounds) / max(size), min(bounds) / min(size))
    return max(1, math.floor(size[0] * factor + 0.5)), max(1, math.floor(size[1] * factor + 0.5))


def open_image(path: Path) -> Image.Image:
    """An image file, decoded.

    Raises:
        UnreadableImageError: no such file, or a damaged one.
    """
    try:
        with Image.open(path) as image:
            image.load()
    except FileNotFoundError as error:
        raise UnreadableImageError(f"{path}: no such file", MISSING_IMAGE) from error
    except UNREADABLE as error:
        message = f"{path}: unreadable image ({error}); repair or delete it"
        raise UnreadableImageError(message) from error
    return image


# These draw from torch's global generator, which `fastvim.data.sampler` seeds for each sample.


def chance(probability: float) -> bool:
    """True with that probability."""
    return torch.rand(()).item() < probability


def uniform(low: float, high: float) -> float:
    """A number from `low` to `high`."""
    return low + (high - low) * torch.rand(()).item()


def integer(high: int) -> int:
    """An integer from 0 to `high`."""
    return int(torch.randint(high + 1, ()).item())
