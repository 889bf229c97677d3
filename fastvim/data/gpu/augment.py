"""The operations of `fastvim.data.gpu.planned` on a batch of images, as Pillow does them.

They are equal to Pillow's, bit for bit.

B: images of a batch; h, w: height and width; n: images that get one kind of operation
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fastvim.data.gpu.planned import KINDS, NUMBERS
from fastvim.data.gpu.sending import send

AFFINE, COLOUR, SHARPNESS = map(KINDS.index, ("affine", "colour", "sharpness"))
TABLES = set(range(len(KINDS))) - {AFFINE, COLOUR, SHARPNESS}
GREY = (19595, 38470, 7471)  # of red, green and blue, in parts of 2 ** 16


def augment(images: Tensor, operations: np.ndarray) -> Tensor:
    """Do the operations of each image, in order.

    Args:
        images: uint8 (B, 3, h, w).
        operations: float64 (B, most of an image, `NUMBERS`).

    Returns:
        uint8 (B, 3, h, w).
    """
    if not operations.size:
        return images
    known = torch.from_numpy(operations)
    if images.device.type == "cuda":
        return _by_kernels(images, known)
    images = images.clone()
    for turn in known.unbind(1):
        kinds = turn[:, 0].int().tolist()
        for of in ({AFFINE}, TABLES, {COLOUR}, {SHARPNESS}):
            rows = [row for row, kind in enumerate(kinds) if kind in of]
            if not rows:
                continue
            some, numbers = images[rows], turn[rows]
            if of == {AFFINE}:
                some = affine(some, numbers[:, 1:])
            elif of is TABLES:
                some = look_up(some, tables(some, numbers))
            elif of == {COLOUR}:
                some = blend(grey(some)[:, None], some, numbers[:, 1])
            else:
                some = blend(smooth(some), some, numbers[:, 1])
            images[rows] = some
    return images


def _by_kernels(images: Tensor, known: Tensor) -> Tensor:
    from fastvim.data.gpu.kernels.augment import augment_once  # needs Triton

    known = send(known, images.device)
    table = images.new_empty(len(images), 3, 256)
    for turn in range(known.shape[1]):
        result = torch.empty_like(images)
        augment_once(images, known, turn, table, result)
        images = result
    return images


def affine(images: Tensor, numbers: Tensor) -> Tensor:
    """Each pixel read from another place.

    Args:
        images: uint8 (n, 3, h, w).
        numbers: float64 (n, 10), see `Operation`.
    """
    count, _, high, wide = images.shape
    x = torch.arange(wide, dtype=torch.float64) + 0.5
    y = torch.arange(high, dtype=torch.float64)[:, None] + 0.5
    a, b, c, d, e, f, bicubic = numbers[:, :7, None, None].unbind(1)
    across, down = a * x + b * y + c, d * x + e * y + f  # (n, h, w)
    inside = (across >= 0) & (across < wide) & (down >= 0) & (down < high)
    columns, of_x = _four(across - 0.5, wide)
    rows, of_y = _four(down - 0.5, high)
    flat = images.flatten(2)
    lines = []
    for row in rows:
        places = ((row * wide + column).view(count, 1, -1).expand(-1, 3, -1) for column in columns)
        old = [flat.gather(2, each).view_as(images).double() for each in places]
        lines.append(_between(old, of_x[:, None], bicubic[:, None]))
    new = _between(lines, of_y[:, None], bicubic[:, None]).clamp(0, 255).to(torch.uint8)
    return torch.where(inside[:, None], new, numbers[:, 7:10, None, None].to(torch.uint8))


def _four(place: Tensor, size: int) -> tuple[list[Tensor], Tensor]:
    """The four old pixels along an axis that make a new one, and how far from the second it is."""
    first = place.floor()
    middle = first.long()
    return [(middle + step).clamp(0, size - 1) for step in (-1, 0, 1, 2)], place - first


def _between(old: list[Tensor], d: Tensor, bicubic: Tensor) -> Tensor:
    """The value between the second and the third of four, `d` behind the second."""
    a, b, c, e = old
    cubic = b + d * (-a + c + d * (2 * (a - b) + c - e + d * (-a + b - c + e)))
    return torch.where(bicubic > 0, cubic, b + d * (c - b))


def look_up(images: Tensor, table: Tensor) -> Tensor:
    """Values replaced: uint8 (n, 3, h, w) through a table of uint8 (n, 3, 256)."""
    return table.gather(2, images.flatten(2).long()).view_as(images)


def tables(images: Tensor, numbers: Tensor) -> Tensor:
    """The table of each image and channel: uint8 (n, 3, 256).

    Args:
        images: uint8 (n, 3, h, w).
        numbers: float64 (n, `NUMBERS`), each of a kind among `TABLES`.
    """
    assert numbers.shape[1] == NUMBERS
    kind, strength = numbers[:, 0, None, None], numbers[:, 1, None, None]
    value = torch.arange(256, dtype=torch.float64)[None, None]
    whole = value.int()
    solarized = torch.where(value < strength, value, 255 - value)
    kept = 256 - torch.exp2(8 - strength.clamp(0, 8)).int()
    dark = torch.zeros_like(strength)
    mean = (grey(images).flatten(1).double().mean(1) + 0.5).floor()[:, None, None]
    found = {
        "invert": 255 - value,
        "solarize": solarized,
        "solarize_add": torch.where(value < 128, (value + strength).clamp(max=255), value),
        "posterize": (whole & kept).double(),
        "brightness": _blended(dark, value, strength).double(),
        "contrast": _blended(mean, value, strength).double(),
        "autocontrast": _stretched(images, value),
        "equalize": _equalized(images, value),
    }
    table = value.expand(*images.shape[:2], 256)
    for name, entries in found.items():
        table = torch.where(kind == KINDS.index(name), entries, table)
    return table.to(torch.uint8)


def _stretched(images: Tensor, value: Tensor) -> Tensor:
    """From the darkest and the brightest value of each channel to 0 and 255."""
    flat = images.flatten(2)
    low, high = (each.double()[..., None] for each in (flat.amin(2), flat.amax(2)))
    scale = torch.full_like(low, 255.0) / (high - low)  # a number would be multiplied by 1 / it
    stretched = (value * scale - low * scale).clamp(0, 255).trunc()
    return torch.where(high > low, stretched, value)


def _equalized(images: Tensor, value: Tensor) -> Tensor:
    """Each value about as often as the others, in each channel."""
    flat = images.flatten(2)
    counts = torch.zeros(*flat.shape[:2], 256, dtype=torch.int32)
    counts.scatter_add_(2, flat.long(), torch.ones_like(flat, dtype=torch.int32))
    present = counts > 0
    last = (present * value.int()).amax(2, keepdim=True)
    step = (flat.shape[2] - counts.gather(2, last.long())) // 255
    before = counts.cumsum(2, dtype=torch.int32) - counts
    equal = ((step // 2 + before) // step.clamp(min=1)).clamp(max=255)
    plain = (step == 0) | (present.sum(2, keepdim=True) <= 1)
    return torch.where(plain, value, equal.double())


def grey(images: Tensor) -> Tensor:
    """uint8 (n, h, w) of uint8 (n, 3, h, w)."""
    red, green, blue = (channel.int() for channel in images.unbind(1))
    total = GREY[0] * red + GREY[1] * green + GREY[2] * blue + 0x8000
    return (total >> 16).to(torch.uint8)


def smooth(images: Tensor) -> Tensor:
    """The mean of each pixel, five times, and its eight neighbours; borders stay."""
    values = images.int()
    rows = values[..., :-2] + values[..., 1:-1] + values[..., 2:]
    total = rows[..., :-2, :] + rows[..., 1:-1, :] + rows[..., 2:, :]
    total = (2 * (total + 4 * values[..., 1:-1, 1:-1]) + 13) // 26
    result = images.clone()
    result[..., 1:-1, 1:-1] = total.to(torch.uint8)
    return result


def blend(first: Tensor, second: Tensor, share: Tensor) -> Tensor:
    """`share` of the second and the rest of the first, beyond the two as well: uint8 (n, ...)."""
    return _blended(first.float(), second.float(), share[:, None, None, None])


def _blended(first: Tensor, second: Tensor, share: Tensor) -> Tensor:
    first, second, share = first.float(), second.float(), share.float()
    return (first + share * (second - first)).clamp(0, 255).to(torch.uint8)
