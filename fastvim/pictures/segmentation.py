"""Pictures of segmentations: classes as colours over an image, with a legend of their names.

H W  pixels of an image
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor

from fastvim.labels import IGNORE_INDEX
from fastvim.pictures.colours import RED, Colour, palette
from fastvim.pictures.overlay import overlay
from fastvim.pictures.predictions import denormalise
from fastvim.pictures.sheet import LARGEST, Entry, Panel, sheet, shrink, to_image

MOST_NAMES = 24  # in a legend


class Labelling(NamedTuple):
    """One image, the class that the model gives each pixel, and the right ones."""

    image: Tensor  # (C, H', W'), normalised
    predicted: Tensor  # (H, W)
    target: Tensor  # (H, W), or `IGNORE_INDEX`


def index_image(classes: np.ndarray, class_names: Sequence[str]) -> Image.Image:
    """Class indices (H, W) as pixels with a palette: a viewer shows colours, black a background."""
    image = Image.fromarray(classes.astype(np.uint8))
    image.putpalette([value for colour in palette(class_names) for value in colour or (0, 0, 0)])
    return image


def draw_classes(
    image: Image.Image, classes: np.ndarray, class_names: Sequence[str]
) -> Image.Image:
    """An image, and beside it its classes as colours.

    Args:
        image: RGB, of the size of the classes.
        classes: indices (H, W).
        class_names: of each class.
    """
    shown = shrink(image)
    indices = np.asarray(shrink(Image.fromarray(classes.astype(np.uint8)), LARGEST, smooth=False))
    drawn = overlay(shown, class_masks(indices, class_names))
    return sheet([[Panel(shown, "image"), Panel(drawn, "classes")]], legend([classes], class_names))


def draw_labellings(
    labellings: Sequence[Labelling],
    class_names: Sequence[str],
    mean: Sequence[float],
    std: Sequence[float],
) -> Image.Image:
    """A row for each image: itself, the right classes over it, the predicted ones, the mistakes.

    Args:
        labellings: in the order to show them.
        class_names: name of each class.
        mean: of the normalisation, one value per channel, or one for all.
        std: likewise.
    """
    rows: list[list[Panel]] = []
    wrong = counted = 0
    for image, predicted, target in labellings:
        size = (target.shape[1], target.shape[0])
        plain = to_image(denormalise(image, mean, std)).resize(size, Image.Resampling.BILINEAR)
        errors = (target != IGNORE_INDEX) & (predicted != target)
        wrong += int(errors.sum())
        counted += int((target != IGNORE_INDEX).sum())
        drawn = [overlay(plain, class_masks(c.numpy(), class_names)) for c in (target, predicted)]
        images = [plain, *drawn, mistakes(plain, errors.numpy())]
        captions = ("image", "labels", "prediction", "mistakes") if not rows else [""] * 4
        rows.append([Panel(*both) for both in zip(images, captions, strict=True)])
    entries = legend([labelling.predicted.numpy() for labelling in labellings], class_names)
    share = f"wrong {wrong / counted:.1%}" if counted else "no pixel counts"
    return sheet(rows, [*entries, Entry(RED, share)])


def class_masks(
    classes: np.ndarray, class_names: Sequence[str]
) -> Iterator[tuple[np.ndarray, Colour]]:
    """The mask and the colour of each class that occurs, but a background; classes are (H, W)."""
    colours = palette(class_names)
    for index in np.unique(classes):
        if index < len(colours) and (colour := colours[index]) is not None:
            yield classes == index, colour


def mistakes(image: Image.Image, wrong: np.ndarray) -> Image.Image:
    """A paler RGB image with the wrong pixels, bool (H, W), in red."""
    pixels = 255 - 0.45 * (255 - np.asarray(image.convert("L").convert("RGB"), dtype=np.float32))
    return Image.fromarray(np.where(wrong[..., None], RED, np.rint(pixels)).astype(np.uint8))


def legend(classes: Sequence[np.ndarray], class_names: Sequence[str]) -> list[Entry]:
    """The classes that occur, with their share of the pixels that count, the largest ones first."""
    counts = sum(np.bincount(c.ravel(), minlength=256)[:IGNORE_INDEX] for c in classes)
    assert isinstance(counts, np.ndarray)
    colours, total = palette(class_names), max(1, int(counts.sum()))
    order = [int(i) for i in np.argsort(-counts, kind="stable") if counts[i]]
    entries = [
        Entry(colours[i], f"{class_names[i]} {counts[i] / total:.1%}") for i in order[:MOST_NAMES]
    ]
    if len(order) > MOST_NAMES:
        rest = counts[order[MOST_NAMES:]].sum() / total
        entries.append(Entry(None, f"{len(order) - MOST_NAMES} more {rest:.1%}"))
    return entries
