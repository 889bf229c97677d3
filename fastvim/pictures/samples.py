"""Pictures of training samples with their labels, as training sees them.

C  channels, H W  pixels of an image, n  objects in it
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image
from torch import Tensor

from fastvim.pictures.colours import class_colour
from fastvim.pictures.detections import with_boxes
from fastvim.pictures.overlay import overlay
from fastvim.pictures.predictions import denormalise, short
from fastvim.pictures.segmentation import class_masks, legend
from fastvim.pictures.sheet import LARGEST, Entry, Panel, enlarge, sheet, to_image

COLUMNS = 4
SIZE = 256  # longer side of an image, in pixels


def draw_samples(
    samples: Sequence[tuple[Tensor, Any]],
    class_names: Sequence[str],
    mean: Sequence[float],
    std: Sequence[float],
    title: str,
) -> Image.Image:
    """A grid of images: each under its class, or with its mask or its objects over it.

    Args:
        samples: one or more images (C, H, W), normalised, each with its label: a class index, or
            the index of each pixel (H, W), or objects as "boxes" (n, 4), x1, y1, x2, y2, "labels"
            (n,) from 1 on, and "masks" (n, H, W).
        class_names: of the indices; fewer where the images have no classes.
        mean: of the normalisation, one value per channel, or one for all.
        std: likewise.
        title: above the grid.
    """
    panels, masks = [], []
    for pixels, label in samples:
        image = to_image(denormalise(pixels, mean, std))
        if isinstance(label, int):
            known = 0 <= label < len(class_names)
            panels.append(Panel(image, short(class_names[label]) if known else ""))
        elif isinstance(label, Tensor):
            masks.append(label.numpy())
            panels.append(Panel(overlay(image, class_masks(masks[-1], class_names))))
        else:
            panels.append(Panel(_with_objects(image, label, class_names)))
    entries: list[Entry] = legend(masks, class_names) if masks else []
    rows = [panels[start : start + COLUMNS] for start in range(0, len(panels), COLUMNS)]
    return sheet(rows, entries, title=title, size=SIZE, largest=2 * SIZE)


def _with_objects(
    image: Image.Image, objects: dict[str, Tensor], class_names: Sequence[str]
) -> Image.Image:
    """An image with the masks, boxes and names of its objects; a small one is enlarged."""
    factor = max(1, LARGEST // 2 // max(image.size))
    image = enlarge(image, factor)
    indices = [int(label) - 1 for label in objects["labels"]]
    if not indices:
        return image
    colours = [class_colour(index) for index in indices]
    masks = objects["masks"].repeat_interleave(factor, 1).repeat_interleave(factor, 2)
    shown = overlay(image, zip(masks.numpy() > 0, colours, strict=True))
    names = [class_names[index] for index in indices]
    return with_boxes(shown, factor * objects["boxes"], colours, names)
