"""The kernels of `fastvim.data.gpu.augment`: two launches for one operation of every image.

They compute as the definitions there do, without fused multiply-adds.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastvim.data.gpu.planned import KINDS

BLOCK = 1024  # pixels of a program

_AFFINE = tl.constexpr(KINDS.index("affine"))
_AUTOCONTRAST = tl.constexpr(KINDS.index("autocontrast"))
_EQUALIZE = tl.constexpr(KINDS.index("equalize"))
_INVERT = tl.constexpr(KINDS.index("invert"))
_POSTERIZE = tl.constexpr(KINDS.index("posterize"))
_SOLARIZE = tl.constexpr(KINDS.index("solarize"))
_SOLARIZE_ADD = tl.constexpr(KINDS.index("solarize_add"))
_BRIGHTNESS = tl.constexpr(KINDS.index("brightness"))
_CONTRAST = tl.constexpr(KINDS.index("contrast"))
_COLOUR = tl.constexpr(KINDS.index("colour"))
_SHARPNESS = tl.constexpr(KINDS.index("sharpness"))


@triton.jit
def _blended(first, second, share):
    mixed = first + share * (second - first)
    return tl.minimum(tl.maximum(mixed, 0.0), 255.0).to(tl.int32)


@triton.jit
def _grey(image, place, pixels, inside):
    red = tl.load(image + place, mask=inside, other=0).to(tl.int32)
    green = tl.load(image + pixels + place, mask=inside, other=0).to(tl.int32)
    blue = tl.load(image + 2 * pixels + place, mask=inside, other=0).to(tl.int32)
    return (19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16


@triton.jit(do_not_specialize=["stride", "pixels", "begin"])
def _tables_kernel(images, operations, begin, tables, stride, pixels, BLOCK: tl.constexpr):
    number = tl.program_id(0).to(tl.int64)
    image = images + number * 3 * pixels
    numbers = operations + begin + number * stride
    kind = tl.load(numbers).to(tl.int32)
    strength = tl.load(numbers + 1)
    value = tl.arange(0, 256)
    exact = value.to(tl.float64)
    table = value
    level = value.to(tl.float32)
    share = strength.to(tl.float32)
    if kind == _INVERT:
        table = 255 - value
    elif kind == _SOLARIZE:
        table = tl.where(exact < strength, value, 255 - value)
    elif kind == _SOLARIZE_ADD:
        table = tl.where(value < 128, tl.minimum(value + strength.to(tl.int32), 255), value)
    elif kind == _POSTERIZE:
        dropped = 8 - tl.minimum(tl.maximum(strength.to(tl.int32), 0), 8)
        table = (value >> dropped) << dropped
    elif kind == _BRIGHTNESS:
        table = _blended(level * 0.0, level, share)
    elif kind == _CONTRAST:
        total = tl.zeros((BLOCK,), tl.int64)
        for first in range(0, pixels, BLOCK):
            place = first + tl.arange(0, BLOCK)
            total += _grey(image, place, pixels, place < pixels).to(tl.int64)
        mean = tl.floor(tl.sum(total, 0).to(tl.float64) / pixels + 0.5).to(tl.float32)
        table = _blended(
            value.to(tl.float32) * 0.0 + mean, value.to(tl.float32), strength.to(tl.float32)
        )
    elif (kind == _AUTOCONTRAST) | (kind == _EQUALIZE):
        channel = image + tl.program_id(1) * pixels
        counts = tl.zeros((256,), tl.int32)
        for first in range(0, pixels, BLOCK):
            place = first + tl.arange(0, BLOCK)
            old = tl.load(channel + place, mask=place < pixels, other=0).to(tl.int32)
            counts += tl.histogram(old, 256)
        padding = tl.cdiv(pixels, BLOCK) * BLOCK - pixels
        counts -= tl.where(value == 0, padding, 0)
        low = tl.min(tl.where(counts > 0, value, 255), 0)
        high = tl.max(tl.where(counts > 0, value, 0), 0)
        if kind == _AUTOCONTRAST:
            if high > low:
                scale = 255.0 / (high - low).to(tl.float64)
                stretched = exact * scale - low.to(tl.float64) * scale
                stretched = tl.minimum(tl.maximum(stretched, 0.0), 255.0)
                table = stretched.to(tl.int32)
        else:
            step = (pixels - tl.sum(tl.where(value == high, counts, 0), 0)) // 255
            if (step > 0) & (high > low):
                before = tl.cumsum(counts, 0) - counts
                table = tl.minimum((step // 2 + before) // step, 255)
    tl.store(tables + (number * 3 + tl.program_id(1)) * 256 + value, table.to(tl.uint8))


@triton.jit
def _between(a, b, c, e, d, bicubic):
    cubic = b + d * (-a + c + d * (2 * (a - b) + c - e + d * (-a + b - c + e)))
    return tl.where(bicubic, cubic, b + d * (c - b))


@triton.jit
def _line(line, column, wide, d, bicubic, inside):
    """A row of an image between its second and third of four columns."""
    x0 = tl.minimum(tl.maximum(column - 1, 0), wide - 1)
    x1 = tl.minimum(tl.maximum(column, 0), wide - 1)
    x2 = tl.minimum(tl.maximum(column + 1, 0), wide - 1)
    x3 = tl.minimum(tl.maximum(column + 2, 0), wide - 1)
    a = tl.load(line + x0, mask=inside, other=0).to(tl.float64)
    b = tl.load(line + x1, mask=inside, other=0).to(tl.float64)
    c = tl.load(line + x2, mask=inside, other=0).to(tl.float64)
    e = tl.load(line + x3, mask=inside, other=0).to(tl.float64)
    return _between(a, b, c, e, d, bicubic)


@triton.jit
def _affine(image, new, numbers, place, inside, high, wide):
    pixels = high * wide
    x = (place % wide).to(tl.float64) + 0.5
    y = (place // wide).to(tl.float64) + 0.5
    across = tl.load(numbers + 1) * x + tl.load(numbers + 2) * y + tl.load(numbers + 3)
    down = tl.load(numbers + 4) * x + tl.load(numbers + 5) * y + tl.load(numbers + 6)
    bicubic = tl.load(numbers + 7) > 0
    within = (across >= 0) & (across < wide) & (down >= 0) & (down < high)
    first_x = tl.floor(across - 0.5)
    first_y = tl.floor(down - 0.5)
    of_x = across - 0.5 - first_x
    of_y = down - 0.5 - first_y
    column = first_x.to(tl.int32)
    row = first_y.to(tl.int32)
    y0 = tl.minimum(tl.maximum(row - 1, 0), high - 1) * wide
    y1 = tl.minimum(tl.maximum(row, 0), high - 1) * wide
    y2 = tl.minimum(tl.maximum(row + 1, 0), high - 1) * wide
    y3 = tl.minimum(tl.maximum(row + 2, 0), high - 1) * wide
    for channel in range(3):
        old = image + channel * pixels
        a = _line(old + y0, column, wide, of_x, bicubic, within & inside)
        b = _line(old + y1, column, wide, of_x, bicubic, within & inside)
        c = _line(old + y2, column, wide, of_x, bicubic, within & inside)
        e = _line(old + y3, column, wide, of_x, bicubic, within & inside)
        total = _between(a, b, c, e, of_y, bicubic)
        total = tl.minimum(tl.maximum(total, 0.0), 255.0).to(tl.int32)
        fill = tl.load(numbers + 8 + channel).to(tl.int32)
        total = tl.where(within, total, fill).to(tl.uint8)
        tl.store(new + channel * pixels + place, total, mask=inside)


@triton.jit
def _colour(image, new, share, place, inside, pixels):
    grey = _grey(image, place, pixels, inside).to(tl.float32)
    for channel in tl.static_range(3):
        old = tl.load(image + channel * pixels + place, mask=inside, other=0).to(tl.float32)
        mixed = _blended(grey, old, share)
        tl.store(new + channel * pixels + place, mixed.to(tl.uint8), mask=inside)


@triton.jit
def _sharpen(image, new, share, place, inside, high, wide):
    pixels = high * wide
    x = place % wide
    y = place // wide
    border = (x == 0) | (x == wide - 1) | (y == 0) | (y == high - 1)
    for channel in tl.static_range(3):
        begin = image + channel * pixels + place
        old = tl.load(begin, mask=inside, other=0).to(tl.int32)
        total = 4 * old
        for j in tl.static_range(3):
            for i in tl.static_range(3):
                beside = begin + ((j - 1) * wide + (i - 1))
                total += tl.load(beside, mask=inside & (border == 0), other=0).to(tl.int32)
        smooth = tl.where(border, old, (2 * total + 13) // 26)
        mixed = _blended(smooth.to(tl.float32), old.to(tl.float32), share)
        tl.store(new + channel * pixels + place, mixed.to(tl.uint8), mask=inside)


@triton.jit
def _look_up(image, new, table, kind, place, inside, pixels):
    for channel in tl.static_range(3):
        old = tl.load(image + channel * pixels + place, mask=inside, other=0)
        if kind >= 0:
            old = tl.load(table + channel * 256 + old.to(tl.int32), mask=inside, other=0)
        tl.store(new + channel * pixels + place, old, mask=inside)


@triton.jit(do_not_specialize=["begin", "stride", "high", "wide"])
def _apply_kernel(
    images, operations, begin, tables, result, stride, high, wide, BLOCK: tl.constexpr
):
    number = tl.program_id(0).to(tl.int64)
    pixels = high * wide
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = place < pixels
    image = images + number * 3 * pixels
    new = result + number * 3 * pixels
    numbers = operations + begin + number * stride
    kind = tl.load(numbers).to(tl.int32)
    share = tl.load(numbers + 1).to(tl.float32)
    if kind == _AFFINE:
        _affine(image, new, numbers, place, inside, high, wide)
    elif kind == _COLOUR:
        _colour(image, new, share, place, inside, pixels)
    elif kind == _SHARPNESS:
        _sharpen(image, new, share, place, inside, high, wide)
    else:
        _look_up(image, new, tables + number * 768, kind, place, inside, pixels)


def augment_once(
    images: Tensor, operations: Tensor, turn: int, tables: Tensor, result: Tensor
) -> None:
    """One operation of every image.

    Args:
        images: uint8 (B, 3, h, w), contiguous.
        operations: float64 (B, most of an image, `NUMBERS`), contiguous.
        turn: which of an image's operations.
        tables: uint8 (B, 3, 256), written.
        result: uint8 (B, 3, h, w), contiguous, written.
    """
    count, _, high, wide = images.shape
    known = operations, turn * operations.stride(1)
    stride = operations.stride(0)
    exact = {"BLOCK": BLOCK, "enable_fp_fusion": False}
    _tables_kernel[(count, 3)](images, *known, tables, stride, high * wide, **exact)
    grid = (count, triton.cdiv(high * wide, BLOCK))
    _apply_kernel[grid](images, *known, tables, result, stride, high, wide, **exact)
