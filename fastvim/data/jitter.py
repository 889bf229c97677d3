"""Large-scale jitter (arXiv 2012.07177): how a training image of a detector is changed.

H W  height and width of an image as stored, h w  of the crop, n  objects
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.ops import clip_boxes_to_image, masks_to_boxes

from fastvim.data.dense_data import chance, integer, to_tensor, uniform
from fastvim.data.resizing import Window, fit, nearest, resize


class Change(NamedTuple):
    """What happens to one image: mirrored or not, resized to `size`, cropped to `window`."""

    flipped: bool
    size: tuple[int, int]
    window: Window


class LargeScaleJitter:
    """Random flip, resizing and crop, of an image and its objects alike.

    The image is resized to fit in a square of `img_size` times a random factor, truncated to whole
    pixels, then cropped to at most `img_size` at a random place. Nothing is padded: the model pads
    its batches.

    Args:
        img_size: side of the square.
        scale: range of the factor.
        hflip: probability of a horizontal flip.
        antialias: as of `DenseDataModule`; masks follow.
    """

    def __init__(
        self, img_size: int, scale: tuple[float, float], hflip: float, antialias: bool = True
    ) -> None:
        self.img_size, self.scale, self.hflip = img_size, scale, hflip
        self.antialias = antialias

    def draw(self, stored: tuple[int, int]) -> Change:
        """A random change of an image of this width and height."""
        flipped = chance(self.hflip)
        size = self.resized(stored, uniform(*self.scale))
        width, height = (min(side, self.img_size) for side in size)
        top = integer(size[1] - height)
        left = integer(size[0] - width)
        return Change(flipped, size, (left, top, left + width, top + height))

    def resized(self, stored: tuple[int, int], factor: float) -> tuple[int, int]:
        """Width and height of an image resized by a factor of the jitter."""
        bound = max(1, int(self.img_size * factor))
        return fit(stored, (bound, bound))

    def apply(
        self, change: Change, image: Image.Image, boxes: Tensor, masks: np.ndarray
    ) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
        """The changed image, and the objects that it still shows.

        Args:
            change: of `draw`.
            image: RGB.
            boxes: (n, 4) as x1, y1, x2, y2, in its pixels.
            masks: uint8 (H, W, n).

        Returns:
            float32 (3, h, w) with values in 0 to 1; boxes (m, 4) of what the masks show; uint8
            (m, h, w); and the indices (m,) of the objects. None if boxes reach into the crop but no
            mask does.
        """
        if change.flipped:
            image = ImageOps.mirror(image)
            boxes = boxes[:, [2, 1, 0, 3]] * boxes.new_tensor([-1, 1, -1, 1])
            boxes = boxes + boxes.new_tensor([image.width, 0, image.width, 0])
            masks = masks[:, ::-1]
        left, top, right, bottom = change.window
        pixels = to_tensor(resize(image, change.size, self.antialias, change.window))
        factors = [change.size[0] / image.width, change.size[1] / image.height] * 2
        moved = boxes * boxes.new_tensor(factors) - boxes.new_tensor([left, top, left, top])
        moved = clip_boxes_to_image(moved, (bottom - top, right - left))
        near = torch.nonzero((moved[:, 2:] > moved[:, :2]).all(dim=1))[:, 0]

        shown = nearest(masks[..., near.numpy()], change.size, self.antialias, change.window)
        cropped = torch.from_numpy(np.ascontiguousarray(shown.transpose(2, 0, 1)))
        seen = (cropped > 0).flatten(1).any(dim=1)
        if len(near) and not seen.any():
            return None
        cropped, near = cropped[seen], near[seen]
        tight = masks_to_boxes(cropped)
        tight[:, 2:] += 1  # from the last pixels to their outer edges
        return pixels, tight, cropped, near
