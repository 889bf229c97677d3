"""timm's steps for PIL images with the same draws and the same pixels, in fewer calls.

A loading process runs little Python many times a second, always with cold caches: beside decoding
and resizing, calls are what an image costs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data.auto_augment import RandAugment
from timm.data.transforms import RandomResizedCropAndInterpolation, str_to_pil_interp
from torchvision.transforms import RandomHorizontalFlip, RandomVerticalFlip


class Crop(RandomResizedCropAndInterpolation):
    """A random resized crop.

    Args:
        step: timm's.
    """

    def __init__(self, step: RandomResizedCropAndInterpolation) -> None:
        interpolation: Any = step.interpolation  # torchvision's
        super().__init__(step.size, step.scale, step.ratio, interpolation.value)
        self.resample = str_to_pil_interp(interpolation.value)

    def __call__(self, image: Image.Image) -> Image.Image:
        top, left, height, width = self.get_params(image, self.scale, self.ratio)
        part = image.crop((left, top, left + width, top + height))
        return part.resize(self.size[::-1], self.resample)


class Flip:
    """A random flip.

    Args:
        probability: of it.
        way: Pillow's.
    """

    def __init__(self, probability: float, way: Image.Transpose) -> None:
        self.probability = float(np.float32(probability))  # torchvision compares in 32 bits
        self.way = way

    def __call__(self, image: Image.Image) -> Image.Image:
        return image.transpose(self.way) if torch.rand(1).item() < self.probability else image


class FewOf(RandAugment):
    """RandAugment that draws the numbers of its operations; timm makes an array of them each time.

    Args:
        step: timm's.
    """

    def __init__(self, step: RandAugment) -> None:
        super().__init__(step.ops, step.num_layers, step.choice_weights)

    def __call__(self, image: Image.Image) -> Image.Image:
        weights, count = self.choice_weights, len(self.ops)
        if weights is None:  # which is what `choice` draws, after a look at its arguments
            chosen = np.random.randint(0, count, self.num_layers)
        else:
            chosen = np.random.choice(count, self.num_layers, False, weights)
        for number in chosen.tolist():
            image = self.ops[number](image)
        return image


def in_fewer_calls(step: Any) -> Any:
    """A step that does the same as one of timm's transform, or that step itself."""
    if isinstance(step, RandomResizedCropAndInterpolation):
        return Crop(step)
    if isinstance(step, RandomHorizontalFlip):
        return Flip(step.p, Image.Transpose.FLIP_LEFT_RIGHT)
    if isinstance(step, RandomVerticalFlip):
        return Flip(step.p, Image.Transpose.FLIP_TOP_BOTTOM)
    return FewOf(step) if isinstance(step, RandAugment) else step


def to_pixels(image: Image.Image) -> torch.Tensor:
    """The uint8 values (C, H, W) of an image of 8 bits."""
    # Band by band: a batch then copies the values in the order in which they lie.
    values = bytearray().join(band.tobytes() for band in image.split())
    return torch.frombuffer(values, dtype=torch.uint8).view(-1, image.height, image.width)
