"""A batch of 8-bit images normalised, and its rectangles erased, in one launch."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastvim.data.gpu.sending import send

BLOCK = 1024  # pixels of a program


@triton.jit(do_not_specialize=["channels", "pixels", "wide"])
def _finish_kernel(
    images,
    values,  # (C, 256), of each 8-bit value
    rectangles,  # (B, 5): top, left, height, width, seed
    result,
    channels,
    pixels,
    wide,
    ERASED: tl.constexpr,
    FILL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    number = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    present = place < pixels
    for channel in range(channels):
        target = (number * channels + channel) * pixels + place
        old = tl.load(images + target, mask=present, other=0).to(tl.int32)
        new = tl.load(values + channel * 256 + old)
        tl.store(result + target, new, mask=present)
    if ERASED:
        row = rectangles + number * 5
        top = tl.load(row)
        left = tl.load(row + 1)
        height = tl.load(row + 2)
        width = tl.load(row + 3)
        begin = tl.program_id(1) * BLOCK
        if (begin < (top + height) * wide) & (begin + BLOCK > top * wide):
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
                target = (number * channels + channel) * pixels + place
                tl.store(result + target, noise, mask=inside)


def finish(images: Tensor, values: Tensor, rectangles: Tensor | None, fill: str) -> Tensor:
    """Normalised images, erased in rectangles.

    Args:
        images: uint8 (B, C, H, W), contiguous.
        values: float32 (C, 256), what each 8-bit value of a channel becomes.
        rectangles: int64 (B, 5), on the CPU, as `Drawn` has them; None erases nothing.
        fill: as of `Finish`.

    Returns:
        float32 (B, C, H, W).
    """
    count, channels, high, wide = images.shape
    result = values.new_empty(images.shape)
    sent = images if rectangles is None else send(rectangles, images.device)
    grid = (count, triton.cdiv(high * wide, BLOCK))
    if count:
        _finish_kernel[grid](
            *(images, values, sent, result, channels, high * wide, wide),
            ERASED=rectangles is not None,
            FILL=fill,
            BLOCK=BLOCK,
        )
    return result
