"""Helpers of the segmentation and detection data: images to evaluate, random numbers.

H W  height and width of a prepared image
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from fastvim.data.resizing import fit, resize


def prepare_scene(
    image: Image.Image,
    base_size: tuple[int, int] | None,
    mean: Sequence[float],
    std: Sequence[float],
    antialias: bool = True,
) -> Tensor:
    """An RGB image as a segmentor takes it in evaluation: float32 (3, H, W), normalised.

    The arguments are those of `SegmentationData`.
    """
    if base_size is not None:
        image = resize(image, fit(image.size, base_size), antialias)
    return TF.normalize(to_tensor(image), list(mean), list(std))


def prepare_objects(image: Image.Image, longer_side: int, antialias: bool = True) -> Tensor:
    """An RGB image as a detector takes it in evaluation: float32 (3, H, W) with values in 0 to 1.

    Args:
        image: of any size.
        longer_side: that it is resized to, in pixels.
        antialias: as of `DetectionData`.
    """
    return to_tensor(resize(image, fit(image.size, (longer_side, longer_side)), antialias))


def to_tensor(image: Image.Image) -> Tensor:
    """uint8 to float32 (3, H, W) with values in 0 to 1."""
    return TF.to_dtype(TF.pil_to_tensor(image), scale=True)


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
