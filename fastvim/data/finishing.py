"""What is done to a whole batch of images on the device that takes it: normalisation, erasing.

The processes that load images give 8-bit pixels, a quarter of the bytes of the normalised ones.

B: images of a batch; C, H, W: channels, height and width of an image
"""

from __future__ import annotations

import math
import random
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from fastvim.machine import has_triton

CPU = torch.device("cpu")
# As timm's RandomErasing draws a rectangle: its share of the area, its aspect, how often it tries.
AREA = (0.02, 1 / 3)
LOG_ASPECT = (math.log(0.3), math.log(1 / 0.3))
ATTEMPTS = 10
NOWHERE = torch.zeros(5, dtype=torch.int64)


class Drawn(NamedTuple):
    """Pixels of a training image, and what is to be erased of it; or of a batch of them.

    Attributes:
        pixels: uint8 (C, H, W), or (B, C, H, W).
        erased: int64 (5,), or (B, 5): top, left, height and width of the rectangle, and the seed of
            what fills it. Nothing is erased where the height is 0.
    """

    pixels: Tensor
    erased: Tensor


class DrawErasing:
    """Draws the rectangle to erase from Python's generator, as timm's `RandomErasing` does.

    Args:
        probability: that there is one.
    """

    def __init__(self, probability: float) -> None:
        self.probability = probability

    def __call__(self, pixels: Tensor) -> Drawn:
        return Drawn(pixels, self.draw(*pixels.shape[-2:]))

    def draw(self, high: int, wide: int) -> Tensor:
        """What is erased of an image of a height and a width, as `Drawn` has it."""
        if random.random() > self.probability:
            return NOWHERE
        whole = high * wide
        for _ in range(ATTEMPTS):
            area = random.uniform(*AREA) * whole
            aspect = math.exp(random.uniform(*LOG_ASPECT))
            height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if height < high and width < wide:
                top, left = random.randint(0, high - height), random.randint(0, wide - width)
                return torch.tensor((top, left, height, width, random.getrandbits(63)))
        return NOWHERE


class Finish:
    """Makes normalised images of 8-bit pixels, on the CPU or a GPU, and erases rectangles.

    Normalised pixels are equal on every device, bit for bit. The noise of a rectangle follows from
    the image's own seed, whatever the batch; it is another one on another kind of device.

    Args:
        mean: per channel, for values in 0..1.
        std: likewise.
        fill: of a rectangle: "const" (0, the mean), "rand" (one normal value per channel) or
            "pixel" (one per value).
    """

    def __init__(
        self, mean: tuple[float, ...], std: tuple[float, ...], fill: str = "const"
    ) -> None:
        self.mean, self.std, self.fill = mean, std, fill

    def __call__(self, drawn: Tensor | Drawn, device: torch.device = CPU) -> Tensor:
        """Normalised images.

        Args:
            drawn: uint8 (..., C, H, W), with the rectangles of training images or without. Those
                stay on the CPU, where they are read.
            device: of the result.

        Returns:
            float32 (..., C, H, W).
        """
        pixels, erased = drawn if isinstance(drawn, Drawn) else (drawn, None)
        moved = pixels.to(device, non_blocking=device.type == "cuda")
        rectangles = None if erased is None else erased.view(-1, 5)
        if device.type == "cuda" and has_triton():
            from fastvim.data.gpu.kernels.finish import finish

            every = moved.contiguous().view(-1, *moved.shape[-3:])
            values = _of_every_value(self.mean, self.std, device)
            return finish(every, values, rectangles, self.fill).view(moved.shape)
        images = _normalised(moved.to(torch.float32), self.mean, self.std)
        if rectangles is not None:
            self._erase(images.view(-1, *images.shape[-3:]), rectangles.tolist())
        return images

    def warm_up(self, device: torch.device) -> None:
        """Load the kernels of a GPU, which one thread of a process can do at a time."""
        shape = len(self.mean), 8, 8
        self(Drawn(torch.zeros(shape, dtype=torch.uint8), NOWHERE), device)

    def _erase(self, images: Tensor, rectangles: list[list[int]]) -> None:
        generator = torch.Generator(images.device)
        channels = images.shape[1]
        for number, (top, left, height, width, seed) in enumerate(rectangles):
            if not height:
                continue
            part = images[number, :, top : top + height, left : left + width]
            if self.fill == "const":
                part.zero_()
                continue
            generator.manual_seed(seed)
            shape = (channels, height, width) if self.fill == "pixel" else (channels, 1, 1)
            part.copy_(torch.randn(shape, generator=generator, device=images.device))


def _normalised(values: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Values from 0 to 255, float32 (..., C, H, W), which change."""
    # By a number, a GPU would multiply by its rounded reciprocal.
    white, middle, spread = (_channels(each, values.device) for each in ((255.0,), mean, std))
    return values.div_(white).sub_(middle).div_(spread)


@lru_cache(maxsize=64)
def _channels(values: tuple[float, ...], device: torch.device) -> Tensor:
    """(C, 1, 1) on a device, where a copy for every batch would wait for all work before it."""
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=torch.float32).view(-1, 1, 1).to(device)


@lru_cache(maxsize=16)
def _of_every_value(
    mean: tuple[float, ...], std: tuple[float, ...], device: torch.device
) -> Tensor:
    """What each 8-bit value of a channel becomes, (C, 256), as a CPU computes it."""
    with torch.inference_mode(False):
        every = torch.arange(256, dtype=torch.float32).expand(len(mean), 1, 256).contiguous()
        return _normalised(every, mean, std).view(-1, 256).to(device)
