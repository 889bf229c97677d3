"""Pictures of detections: masks, boxes, classes and scores over an image.

H W  pixels of an image
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image
from torchvision.utils import draw_bounding_boxes

from fastvim.models.heads.results import Result, decode
from fastvim.pictures.colours import INK, WHITE, Colour, class_colour
from fastvim.pictures.overlay import overlay
from fastvim.pictures.sheet import LARGEST, Entry, Panel, enlarge, font, sheet, shrink, written

TEXT_SIZE, PADDING = 12, 2
LONGEST_NAME = 16


def draw_detections(
    image: Image.Image, results: Sequence[Result], names: Mapping[int, str]
) -> Image.Image:
    """An image, and beside it what was found there, with the number of each class below.

    Every class has a colour of its own. If there is only one class, every object has its own
    colour, and the name stands only below. Small images are enlarged by a whole number, large ones
    shrink.

    Args:
        image: RGB.
        results: in COCO's format, in the image's pixels.
        names: of all categories, by id.

    Returns:
        RGB.
    """
    shown = enlarge(shrink(image), max(1, LARGEST // max(image.size)))
    of_classes = {category: class_colour(number) for number, category in enumerate(names)}
    drawn = sorted(results, key=lambda result: result["score"])  # the best one lies on top
    if len(names) == 1:
        colours = [class_colour(number) for number in range(len(drawn))]
        labels = [f"{result['score']:.0%}" for result in drawn]
    else:
        colours = [of_classes[result["category_id"]] for result in drawn]
        labels = [
            f"{names[result['category_id']][:LONGEST_NAME]} {result['score']:.0%}"
            for result in drawn
        ]
    panel = overlay(shown, zip(_masks(drawn, shown.size), colours, strict=True))
    if drawn:
        corners = torch.tensor([result["bbox"] for result in drawn])  # x, y, width, height
        corners[:, 2:] += corners[:, :2]
        panel = with_boxes(panel, shown.width / image.width * corners, colours, labels)
    counts = Counter(result["category_id"] for result in drawn)
    entries = [
        Entry(None if len(names) == 1 else of_classes[category], f"{names[category]}: {number}")
        for category, number in counts.most_common()
    ]
    return sheet([[Panel(shown, "image"), Panel(panel, "detections")]], entries)


def _masks(results: Sequence[Result], size: tuple[int, int]) -> Iterator[np.ndarray]:
    """The mask of each object, bool (H, W), in an image of another size (W, H)."""
    for result in results:
        mask = Image.fromarray(decode(result["segmentation"]))
        yield np.asarray(mask.resize(size, Image.Resampling.NEAREST)) > 0


def with_boxes(
    image: Image.Image, corners: Tensor, colours: Sequence[Colour], labels: Sequence[str]
) -> Image.Image:
    """An image with boxes, one or more, and their labels.

    Args:
        image: RGB.
        corners: (n, 4) as x1, y1, x2, y2, in pixels.
        colours: of the boxes.
        labels: of the boxes.
    """
    boxed = draw_bounding_boxes(pil_to_tensor(image), corners, colors=list(colours), width=2)
    picture = to_pil_image(boxed)
    draw = ImageDraw.Draw(picture)
    for (x, y, *_), label, colour in zip(corners.tolist(), labels, colours, strict=True):
        _label(draw, (x, y), label, colour, picture.width)
    return picture


def _label(
    draw: ImageDraw.ImageDraw, corner: tuple[float, float], text: str, colour: Colour, right: int
) -> None:
    """Letters on the colour, above a corner of a box, or below it at the image's upper edge.

    torchvision writes labels into the box, where they hide small objects.
    """
    letters, text = font(TEXT_SIZE), written(text)
    width, height = letters.getlength(text) + 2 * PADDING, TEXT_SIZE + 2 * PADDING
    x = max(0.0, min(corner[0], right - width))
    y = corner[1] - height if corner[1] >= height else corner[1]
    draw.rectangle((x, y, x + width, y + height), fill=colour)
    brightness = sum(share * part for share, part in zip((0.3, 0.59, 0.11), colour, strict=True))
    ink = WHITE if brightness < 150 else INK
    draw.text((x + PADDING, y + height / 2), text, fill=ink, font=letters, anchor="lm")
