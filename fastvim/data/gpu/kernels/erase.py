"""The rectangles of a batch erased in one launch."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastvim.data.gpu.sending import send

BLOCK = 1024  # pixels of a program


@triton.jit(do_not_specialize=["channels", "pixels", "wide"])
def _erase_kernel(
    images,
    rectangles,  # (B, 5): top, left, height, width, seed
    channels,
    pixels,
    wide,
    FILL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    number = tl.program_id(0).to(tl.int64)
    row = rectangles + number * 5
    top = tl.load(row)
    left = tl.load(row + 1)
    height = tl.load(row + 2)
    width = tl.load(row + 3)
    begin = tl.program_id(1) * BLOCK
    if (begin < (top + height) * wide) & (begin + BLOCK > top * wide):
        place = begin + tl.arange(0, BLOCK)
        y = place // wide
        x = place % wide
        inside = (y >= top) & (y < top + height) & (x >= left) & (x < left + width)
        seed = tl.load(row + 4)
        for channel in range(channels):
            if FILL == "const":
                noise = tl.zeros((BLOCK,), tl.float32)
            elif FILL == "rand":
                noise = tl.randn(seed, place * 0 + channel)
            else:
                noise = tl.randn(seed, channel * pixels + place)
            target = images + (number * channels + channel) * pixels + place
            tl.store(target, noise, mask=inside)


def erase(images: Tensor, rectangles: Tensor, fill: str) -> None:
    """Fill the rectangles of images.

    Args:
        images: float32 (B, C, H, W), contiguous, changed.
        rectangles: int64 (B, 5), on the CPU, as `Drawn` has them.
        fill: as of `Finish`.
    """
    rectangles = send(rectangles, images.device)
    count, channels, high, wide = images.shape
    grid = (count, triton.cdiv(high * wide, BLOCK))
    _erase_kernel[grid](*(images, rectangles, channels, high * wide, wide), FILL=fill, BLOCK=BLOCK)
