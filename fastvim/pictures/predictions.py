"""Pictures of classified images, with the mistakes marked.

C  channels, H W  pixels of an image
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from fastvim.pictures.colours import GREEN, RED, SLATE, Colour
from fastvim.pictures.sheet import Panel, sheet, to_image

COLUMNS = 10
SMALL, LARGE = 128, 160  # longer side of an image, in pixels


class Prediction(NamedTuple):
    """One image, its predicted class and the right one."""

    image: Tensor  # (C, H, W), normalised
    predicted: int
    target: int | None  # None where nobody knows
    certainty: float  # probability of the predicted class


def draw_predictions(
    predictions: Sequence[Prediction],
    class_names: Sequence[str],
    mean: Sequence[float],
    std: Sequence[float],
    title: str,
) -> Image.Image:
    """A grid of images with the predicted class and its probability; mistakes framed in red.

    Args:
        predictions: in the order to show them; one or more.
        class_names: name of each class.
        mean: of the normalisation, one value per channel, or one for all.
        std: likewise.
        title: above the grid.
    """
    panels: list[Panel] = []
    for image, predicted, target, certainty in predictions:
        caption = f"{short(class_names[predicted])} ({certainty:.0%})"
        colour: Colour | str = SLATE if target is None else GREEN
        frame = 1
        if target is not None and target != predicted:
            caption += f"\ntrue: {short(class_names[target])}"
            colour, frame = RED, 3
        panels.append(Panel(to_image(denormalise(image, mean, std)), caption, colour, frame))
    rows = [panels[i : i + COLUMNS] for i in range(0, len(panels), COLUMNS)]
    return sheet(rows, title=title, size=SMALL, largest=LARGE)


def denormalise(image: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Grey or RGB (1 or 3, H, W) in [0, 1] of a normalised image (C, H, W).

    Other channel counts have no colours, and their values no known range. Their first three
    channels, or their first, are shown, each from its darkest to its brightest pixel.
    """
    image = image.float()
    if len(image) in (1, 3):
        scale, shift = torch.tensor(std).view(-1, 1, 1), torch.tensor(mean).view(-1, 1, 1)
        return (image * scale + shift).clamp(0, 1)
    shown = image[:3] if len(image) > 3 else image[:1]
    low, high = shown.amin((1, 2), keepdim=True), shown.amax((1, 2), keepdim=True)
    return (shown - low) / (high - low).clamp(min=1e-6)


def short(name: str) -> str:
    """A class name that fits over its image."""
    return name if len(name) <= 14 else name[:13] + "…"
