"""The kernels of `fastvim.data.gpu.crops`: one makes the taps of both axes, one resizes an axis."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS, WARPS = 4, 256, 4  # of the pixels of a program, and its threads / 32
NEW, TAPS = 16, 16  # new pixels of a program that makes taps, and how many of each at a time
FIELDS = 12  # of a crop: see `resize`


@triton.jit
def _sinc(x):
    turn = x * 3.141592653589793
    return tl.where(x == 0, 1.0, tl.sin(turn) / tl.where(x == 0, 1.0, turn))


@triton.jit
def _share(x, FILTER: tl.constexpr):
    """As the filter of that name in `FILTERS`."""
    far = tl.abs(x)
    if FILTER == "box":
        share = tl.where((x > -0.5) & (x <= 0.5), 1.0, 0.0)
    elif FILTER == "bilinear":
        share = tl.maximum(1 - far, 0.0)
    elif FILTER == "bicubic":
        near = (1.5 * far - 2.5) * far * far + 1
        share = (((far - 5) * far + 8) * far - 4) * -0.5
        share = tl.where(far < 1, near, tl.where(far < 2, share, 0.0))
    elif FILTER == "hamming":
        window = 0.54 + 0.46 * tl.cos(3.141592653589793 * far)
        share = tl.where(far < 1, _sinc(far) * window, 0.0)
    else:
        share = tl.where(far < 3, _sinc(far) * _sinc(far / 3), 0.0)
    return share


@triton.jit
def _reach(length, sides, radius):
    """How many old pixels make a new one of an axis, and how far they lie from its middle."""
    scale = length.to(tl.float64) / sides.to(tl.float64)
    coarse = tl.maximum(scale, 1.0)
    reach = radius * coarse
    return scale, coarse, reach, tl.ceil(reach).to(tl.int32) * 2 + 1


@triton.jit(do_not_specialize=["count", "most", "high", "wide", "taps", "radius"])
def _taps_kernel(
    crops,
    first,  # (2, B, most), the width's first
    weights,  # (2, B, taps, most)
    count,
    most,
    high,
    wide,
    taps,
    radius,
    FILTER: tl.constexpr,
    BITS: tl.constexpr,
    FIELDS: tl.constexpr,
    NEW: tl.constexpr,
    TAPS: tl.constexpr,
):
    new = tl.program_id(0) * NEW + tl.arange(0, NEW)
    image = tl.program_id(1)
    axis = tl.program_id(2)
    present = new < tl.where(axis == 0, wide, high)
    row = crops + image * FIELDS + axis
    length = tl.load(row + 4)
    mirrored = tl.load(row + 6) > 0
    sides = tl.load(row + 8)
    kept = tl.load(row + 10) + new
    scale, coarse, reach, number = _reach(length, sides, radius)
    middle = (tl.where(mirrored, sides - 1 - kept, kept).to(tl.float64) + 0.5) * scale
    p_first = first + (axis * count + image) * most + new
    p_weights = weights + (axis * count + image) * taps * most + new
    if FILTER == "nearest":
        tl.store(p_first, middle.to(tl.int32), mask=present)
        tl.store(p_weights, tl.full((NEW,), 1 << BITS, tl.int32), mask=present)
    else:
        begin = tl.maximum(middle - reach + 0.5, 0.0).to(tl.int32)
        end = tl.minimum((middle + reach + 0.5).to(tl.int32), length.to(tl.int32))
        tl.store(p_first, begin, mask=present)
        whole = tl.zeros((NEW,), tl.float64)
        for tap in range(0, number, TAPS):
            old = begin[:, None] + (tap + tl.arange(0, TAPS))[None, :]
            share = _share((old.to(tl.float64) - middle[:, None] + 0.5) / coarse, FILTER)
            whole += tl.sum(tl.where(old < end[:, None], share, 0.0), 1)
        whole = tl.where(present, whole, 1.0)
        for tap in range(0, number, TAPS):
            place = tap + tl.arange(0, TAPS)
            old = begin[:, None] + place[None, :]
            share = _share((old.to(tl.float64) - middle[:, None] + 0.5) / coarse, FILTER)
            share = tl.where(old < end[:, None], share, 0.0) / whole[:, None] * (1 << BITS)
            weight = (share + tl.where(share < 0, -0.5, 0.5)).to(tl.int32)
            inside = present[:, None] & (place < number)[None, :]
            tl.store(p_weights[:, None] + place[None, :] * most, weight, mask=inside)


@triton.jit(do_not_specialize=["count", "most", "taps", "tall", "high", "wide", "radius"])
def _resize_kernel(
    crops,
    between,  # (B, 3, tall, wide)
    first,  # (2, B, most), the width's first
    weights,  # (2, B, taps, most)
    result,  # `between`, or (B, 3, high, wide)
    count,
    most,
    taps,
    tall,
    high,
    wide,
    radius,
    WIDTH: tl.constexpr,  # the axis that is resized
    BITS: tl.constexpr,
    FIELDS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    image = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    crop = crops + image * FIELDS
    rows = high
    if WIDTH:
        rows = tl.load(crop + 5).to(tl.int32)
    else:
        crop += 1
        first += count * most
        weights += count * most * taps
    inside = (row < rows)[:, None] & (column < wide)[None, :]
    length = tl.load(crop + 4)
    number = _reach(length, tl.load(crop + 8), radius)[3]
    if WIDTH:
        pixels = tl.load(crop).to(tl.pointer_type(tl.uint8))
        step, channel = tl.load(crop + 3), tl.load(crop + 1)
        begin = tl.load(first + image * most + column, mask=column < wide, other=0)
        places = pixels + (row[:, None] * tl.load(crop + 2) + begin[None, :] * step)
        p_weights = weights + image * taps * most + column
        weighs = column < wide
        lines = tall
    else:
        pixels = between + image * 3 * tall * wide
        step, channel = wide.to(tl.int64), (tall * wide).to(tl.int64)
        begin = tl.load(first + image * most + row, mask=row < rows, other=0)
        places = pixels + (begin[:, None] * step + column[None, :])
        p_weights = weights + image * taps * most + row
        weighs = row < rows
        lines = high
    if tl.program_id(1) * ROWS < rows:
        red = tl.full((ROWS, COLUMNS), 1 << (BITS - 1), tl.int32)
        green = red
        blue = red
        for tap in range(number):
            weight = tl.load(p_weights + tap * most, mask=weighs, other=0)
            weight = weight[None, :] if WIDTH else weight[:, None]
            counts = inside & (weight != 0)
            old = places + tap * step
            red += tl.load(old, mask=counts, other=0).to(tl.int32) * weight
            green += tl.load(old + channel, mask=counts, other=0).to(tl.int32) * weight
            blue += tl.load(old + 2 * channel, mask=counts, other=0).to(tl.int32) * weight
        target = result + image * 3 * lines * wide + (row[:, None] * wide + column[None, :])
        tl.store(target, _as_byte(red, BITS), mask=inside)
        tl.store(target + lines * wide, _as_byte(green, BITS), mask=inside)
        tl.store(target + 2 * lines * wide, _as_byte(blue, BITS), mask=inside)


@triton.jit
def _as_byte(total, BITS: tl.constexpr):
    return tl.minimum(tl.maximum(total >> BITS, 0), 255).to(tl.uint8)


def resize(
    crops: Tensor,
    tall: int,
    scale: float,
    size: tuple[int, int],
    interpolation: str,
    radius: float,
    bits: int,
) -> Tensor:
    """Crops of images that lie anywhere, resized.

    Args:
        crops: int64 (B, 12), on the device: address of a crop's first byte, strides of channel,
            line and step in bytes; width and height in pixels; whether the result is mirrored
            across, and down; width and height that it is resized to; left and top of what is kept.
        tall: the largest height of them.
        scale: by which one shrinks at most, at least 1.
        size: height and width of the result.
        interpolation: as of `taps`.
        radius: of its filter, 0 for "nearest".
        bits: of a weight behind the point.

    Returns:
        uint8 (B, 3, h, w).
    """
    count, (high, wide) = len(crops), size
    most = max(size)
    number = math.ceil(radius * scale) * 2 + 1
    first = torch.empty(2, count, most, dtype=torch.int32, device=crops.device)
    weights = torch.empty(2, count, number, most, dtype=torch.int32, device=crops.device)
    _taps_kernel[(triton.cdiv(most, NEW), count, 2)](
        *(crops, first, weights, count, most, high, wide, number, radius),
        FILTER=interpolation,
        BITS=bits,
        FIELDS=FIELDS,
        NEW=NEW,
        TAPS=TAPS,
        enable_fp_fusion=False,
    )
    between = torch.empty(count, 3, tall, wide, dtype=torch.uint8, device=crops.device)
    result = torch.empty(count, 3, high, wide, dtype=torch.uint8, device=crops.device)
    for lines, written in ((tall, between), (high, result)):
        _resize_kernel[(count, triton.cdiv(lines, ROWS), triton.cdiv(wide, COLUMNS))](
            *(crops, between, first, weights, written),
            *(count, most, number, tall, high, wide, radius),
            WIDTH=written is between,
            BITS=bits,
            FIELDS=FIELDS,
            ROWS=ROWS,
            COLUMNS=COLUMNS,
            num_warps=WARPS,
        )
    return result
