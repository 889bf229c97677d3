"""Detections as COCO's results: masks at the pixels of the stored image, and their run lengths.

H, W: an image's height and width as stored; n: detections in it
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Size = tuple[int, int]
Result = dict[str, Any]  # "image_id", "category_id", "bbox", "segmentation", "score"


def coco_results(
    found: dict[str, Tensor],
    seen: Size,
    size: Size,
    image_id: int | str,
    category_ids: Sequence[int | str],
) -> list[Result]:
    """Detections of `CascadeMaskRCNN.detect` in COCO's format of results, in stored pixels.

    Boxes may reach beyond the stored image, into what was padding; masks end with it.

    Args:
        found: "boxes" (n, 4), "labels" and "scores" (n,), "masks" (n, 1, 28, 28).
        seen: height and width of the image that the model was given.
        size: (H, W).
        image_id: written into each.
        category_ids: of the labels 1 to K.
    """
    scale = torch.tensor([seen[1] / size[1], seen[0] / size[0]] * 2)
    boxes, masks = found["boxes"].float().cpu() / scale, found["masks"].float().cpu()
    results = []
    for i, (x1, y1, x2, y2) in enumerate(boxes.tolist()):
        results.append(
            {
                "image_id": image_id,
                "category_id": category_ids[int(found["labels"][i]) - 1],
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                # One at a time: all masks of a large photograph would take gigabytes.
                "segmentation": encode(paste(masks[i, 0], (x1, y1, x2, y2), size)),
                "score": float(found["scores"][i]),
            }
        )
    return results


def paste(mask: Tensor, box: Sequence[float], size: Size) -> np.ndarray:
    """A mask that fills a box as the pixels of an image, uint8 (H, W): 1 from 0.5 on.

    Args:
        mask: probabilities, (28, 28).
        box: x1, y1, x2, y2 in the image's pixels.
        size: (H, W).
    """
    pasted = np.zeros(size, dtype=np.uint8)
    place, values = _sample(mask, box, size)
    pasted[place] = (values >= 0.5).numpy()
    return pasted


def paste_probabilities(mask: Tensor, box: Sequence[float], size: Size) -> Tensor:
    """As `paste`, but the probabilities themselves, (H, W)."""
    pasted = mask.new_zeros(size)
    place, values = _sample(mask, box, size)
    pasted[place] = values
    return pasted


def _sample(mask: Tensor, box: Sequence[float], size: Size) -> tuple[tuple[slice, slice], Tensor]:
    """The rows and columns of an image that a mask reaches, and its bilinear values there.

    A pixel takes the value at its middle. Outside of the mask's cells there is 0, so that a value
    fades out half a cell beyond the box. A box without area, or outside of the image, reaches none.
    """
    places, coordinates = [], []
    for axis in (0, 1):
        low, high = box[1 - axis], box[3 - axis]
        margin = (high - low) / (2 * mask.shape[axis])
        first = max(math.ceil(low - margin - 0.5), 0)
        last = min(math.floor(high + margin - 0.5), size[axis] - 1)
        if first > last or low >= high:
            return (slice(0), slice(0)), mask.new_zeros(0, 0)
        middles = torch.arange(first, last + 1, device=mask.device) + 0.5
        coordinates.append(2 * (middles - low) / (high - low) - 1)  # -1 and 1: the box's edges
        places.append(slice(first, last + 1))
    rows, columns = torch.meshgrid(*coordinates, indexing="ij")
    grid = torch.stack([columns, rows], dim=-1)[None].to(mask.dtype)
    values = F.grid_sample(mask[None, None], grid, padding_mode="zeros", align_corners=False)
    return (places[0], places[1]), values[0, 0]


# COCO's compressed run lengths. Pixels are counted down the columns; the first run is of pixels
# outside of the object. From the fourth on a run is stored as its difference from the run two
# before. Numbers are in digits of 5 bits, the lowest first, in two's complement; a sixth bit says
# that more follow. Each digit is a character from "0" on.
_DIGITS = 7  # enough for 2**34 pixels


def encode(mask: np.ndarray) -> dict[str, Any]:
    """A mask (H, W) of 0 and 1 as {"size": [H, W], "counts": text}, in JSON's types."""
    pixels = (mask != 0).T.ravel()
    changes = np.flatnonzero(np.diff(pixels, prepend=False))
    runs = np.diff(changes, prepend=0, append=pixels.size)
    numbers = runs.copy()
    numbers[3:] -= runs[1:-2]
    places = np.arange(_DIGITS)
    digits = numbers[:, None] >> 5 * places & 31
    rest = numbers[:, None] >> 5 * (places + 1)
    last = np.argmax(rest == -(digits >> 4), axis=1)[:, None]  # what follows repeats the sign
    characters = digits + 32 * (places < last) + ord("0")
    text = characters[places <= last].astype(np.uint8).tobytes().decode("ascii")
    return {"size": list(mask.shape), "counts": text}


def decode(encoded: dict[str, Any]) -> np.ndarray:
    """The mask of `encode`, uint8 (H, W)."""
    height, width = encoded["size"]
    digits = np.frombuffer(encoded["counts"].encode("ascii"), np.uint8).astype(np.int64) - ord("0")
    ends = np.flatnonzero(digits < 32)
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    places = np.arange(digits.size) - np.repeat(starts, lengths)
    runs = np.add.reduceat((digits & 31) << 5 * places, starts)
    runs -= (digits[ends] >> 4 & 1) << 5 * lengths
    runs[1::2] = np.cumsum(runs[1::2])
    runs[2::2] = np.cumsum(runs[2::2])
    pixels = np.repeat(np.arange(runs.size) % 2, runs).astype(np.uint8)
    return pixels.reshape(width, height).T
