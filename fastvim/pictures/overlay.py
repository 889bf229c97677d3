"""Masks over an image, as tints of their colours.

H W  pixels of an image
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.v2.functional import pil_to_tensor
from torchvision.utils import draw_segmentation_masks

from fastvim.pictures.colours import Colour
from fastvim.pictures.sheet import to_image

OPACITY = 0.42


def overlay(image: Image.Image, masks: Iterable[tuple[np.ndarray, Colour]]) -> Image.Image:
    """An image under masks: each a tint of its colour within a line of that colour.

    Args:
        image: RGB.
        masks: bool (H, W) and the colour; the last one lies on top.
    """
    pixels = pil_to_tensor(image) / 255  # in float: torchvision rounds integers down
    for mask, colour in masks:
        rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
        if len(rows):
            box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
            line, crop = _border(mask)[box], pixels[:, box[0], box[1]]
            for part, opacity in ((mask[box] & ~line, OPACITY), (mask[box] & line, 1.0)):
                crop = draw_segmentation_masks(crop, torch.from_numpy(part), opacity, colour)
            pixels[:, box[0], box[1]] = crop
    return to_image(pixels)


def _border(mask: np.ndarray) -> np.ndarray:
    """The pixels with another value beside or below, above or left of them, (H, W)."""
    border = np.zeros(mask.shape, dtype=bool)
    for axis in (0, 1):
        ahead, behind = [slice(None)] * 2, [slice(None)] * 2
        ahead[axis], behind[axis] = slice(1, None), slice(None, -1)
        differs = mask[tuple(ahead)] != mask[tuple(behind)]
        border[tuple(ahead)] |= differs
        border[tuple(behind)] |= differs
    return border
