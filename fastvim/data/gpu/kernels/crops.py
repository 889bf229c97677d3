"""The kernels of `fastvim.data.gpu.crops`: one makes the taps of both axes, one resizes an axis."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

NEW, LINES = 32, 32  # new pixels and lines of a program
TAPS = 64  # of one new pixel, of a program that makes them
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


@triton.jit(do_not_specialize=["count", "most", "high", "wide", "taps", "radius"])
def _taps_kernel(
    crops,
    first,  # (2, B, most), the width's first
    weights,  # (2, B, most, taps)
    count,
    most,
    high,
    wide,
    taps,
    radius,
    FILTER: tl.constexpr,
    BITS: tl.constexpr,
    FIELDS: tl.constexpr,
    TAPS: tl.constexpr,
):
    new = tl.program_id(0)
    image = tl.program_id(1)
    axis = tl.program_id(2)
    size = tl.where(axis == 0, wide, high)
    row = crops + image * FIELDS + axis
    length = tl.load(row + 4).to(tl.float64)
    mirrored = tl.load(row + 6) > 0
    sides = tl.load(row + 8)
    kept = tl.load(row + 10) + new
    scale = length / sides.to(tl.float64)
    middle = (tl.where(mirrored, sides - 1 - kept, kept).to(tl.float64) + 0.5) * scale
    place = (axis * count + image) * most + new
    if new >= size:
        pass
    elif FILTER == "nearest":
        tl.store(first + place, middle.to(tl.int32))
        tl.store(weights + place * taps, 1 << BITS)
    else:
        coarse = tl.maximum(scale, 1.0)
        reach = radius * coarse
        begin = tl.maximum(middle - reach + 0.5, 0.0).to(tl.int32)
        end = tl.minimum((middle + reach + 0.5).to(tl.int32), length.to(tl.int32))
        total = tl.zeros((TAPS,), tl.float64)
        for tap in range(0, taps, TAPS):
            old = begin + tap + tl.arange(0, TAPS)
            share = _share((old.to(tl.float64) - middle + 0.5) / coarse, FILTER)
            total += tl.where(old < end, share, 0.0)
        whole = tl.sum(total, 0)
        for tap in range(0, taps, TAPS):
            old = begin + tap + tl.arange(0, TAPS)
            share = _share((old.to(tl.float64) - middle + 0.5) / coarse, FILTER)
            share = tl.where(old < end, share, 0.0) / whole * (1 << BITS)
            weight = (share + tl.where(share < 0, -0.5, 0.5)).to(tl.int32)
            inside = tap + tl.arange(0, TAPS) < taps
            tl.store(weights + place * taps + tap + tl.arange(0, TAPS), weight, mask=inside)
        tl.store(first + place, begin)


@triton.jit(do_not_specialize=["count", "most", "taps", "tall", "high", "wide"])
def _resize_kernel(
    crops,
    between,  # (B, 3, tall, wide)
    first,  # (2, B, most), the width's first
    weights,  # (2, B, most, taps)
    result,  # `between`, or (B, 3, high, wide)
    count,
    most,
    taps,
    tall,
    high,
    wide,
    WIDTH: tl.constexpr,  # the axis that is resized
    BITS: tl.constexpr,
    FIELDS: tl.constexpr,
    NEW: tl.constexpr,
    LINES: tl.constexpr,
):
    image = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(2)
    crop = crops + image * FIELDS
    if WIDTH:
        size, lines = wide, tl.load(crop + 5)
    else:
        size, lines = high, wide.to(tl.int64)
        first += count * most
        weights += count * most * taps
    blocks = tl.cdiv(size, NEW)
    new = tl.program_id(1) % blocks * NEW + tl.arange(0, NEW)
    line = tl.program_id(1) // blocks * LINES + tl.arange(0, LINES)
    if tl.program_id(1) // blocks * LINES < lines:
        if WIDTH:
            pixels = tl.load(crop).to(tl.pointer_type(tl.uint8)) + channel * tl.load(crop + 1)
            step, of_line = tl.load(crop + 3), line * tl.load(crop + 2)
        else:
            pixels = between + (image * 3 + channel) * tall * wide
            step, of_line = wide, line
        begin = tl.load(first + image * most + new, mask=new < size, other=0)
        inside = (line < lines)[:, None] & (new < size)[None, :]
        places = pixels + (of_line[:, None] + begin[None, :] * step)
        total = tl.full((LINES, NEW), 1 << (BITS - 1), tl.int32)
        for tap in range(taps):
            weight = tl.load(weights + (image * most + new) * taps + tap, mask=new < size, other=0)
            counts = inside & (weight != 0)[None, :]
            old = tl.load(places + tap * step, mask=counts, other=0)
            total += old.to(tl.int32) * weight[None, :]
        total = tl.minimum(tl.maximum(total >> BITS, 0), 255).to(tl.uint8)
        if WIDTH:
            places = result + (image * 3 + channel) * tall * wide
            places = places + (line[:, None] * wide + new[None, :])
        else:
            places = result + (image * 3 + channel) * high * wide
            places = places + (line[:, None] + new[None, :] * wide)
        tl.store(places, total, mask=inside)


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
    weights = torch.empty(2, count, most, number, dtype=torch.int32, device=crops.device)
    _taps_kernel[(most, count, 2)](
        *(crops, first, weights, count, most, high, wide, number, radius),
        FILTER=interpolation,
        BITS=bits,
        FIELDS=FIELDS,
        TAPS=TAPS,
        enable_fp_fusion=False,
    )
    between = torch.empty(count, 3, tall, wide, dtype=torch.uint8, device=crops.device)
    result = torch.empty(count, 3, high, wide, dtype=torch.uint8, device=crops.device)
    for axis, (new, lines, written) in enumerate(((wide, tall, between), (high, wide, result))):
        _resize_kernel[(count, triton.cdiv(new, NEW) * triton.cdiv(lines, LINES), 3)](
            *(crops, between, first, weights, written),
            *(count, most, number, tall, high, wide),
            WIDTH=axis == 0,
            BITS=bits,
            FIELDS=FIELDS,
            NEW=NEW,
            LINES=LINES,
        )
    return result
