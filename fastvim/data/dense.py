"""What images with answers inside them need: sizes, files, batches of lists, random numbers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.utils.data import DataLoader

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


def with_lists(loader: DataLoader[Any]) -> DataLoader[Any]:
    """Let a loader give (list, list) of its pairs: images have sizes of their own."""
    loader.collate_fn = _collate_lists
    return loader


def _collate_lists(samples: list[tuple[Any, Any]]) -> tuple[list[Any], list[Any]]:
    return [first for first, _ in samples], [second for _, second in samples]


# From torch's generator, which `fastvim.data.sampler` seeds for each sample.


def chance(probability: float) -> bool:
    """True with that probability."""
    return torch.rand(()).item() < probability


def uniform(low: float, high: float) -> float:
    """A number of `low` to `high`."""
    return low + (high - low) * torch.rand(()).item()


def integer(high: int) -> int:
    """An integer of 0 to `high`."""
    return int(torch.randint(high + 1, ()).item())
