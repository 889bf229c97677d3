"""Pictures of detections: masks, boxes, classes and scores over an image.

H W  pixels of an image
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from faster_coco_eval.core import mask as mask_api
from PIL import Image, ImageDraw, ImageFilter

from fastvim.tasks.average_precision import Result
from fastvim.tasks.pictures.drawing import LARGEST, OPACITY, WHITE, Entry, font, palette, sheet

TEXT_SIZE, PADDING = 12, 2
LONGEST_NAME = 16
INK = "#0f172a"

Colour = tuple[int, int, int]


def draw_detections(
    image: Image.Image, results: Sequence[Result], names: Mapping[int, str]
) -> Image.Image:
    """An image, and beside it what was found there, with the number of each class below.

    Every class has a colour of its own; if there is one alone, every object has, and its name
    stands only below. Small images are enlarged by a whole number, large ones shrink.

    Args:
        image: RGB.
        results: in COCO's format, in the image's pixels.
        names: of all categories, by id.

    Returns:
        RGB.
    """
    longer = max(image.size)
    factor = max(1, LARGEST // longer) if longer < LARGEST else LARGEST / longer
    size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    smooth = Image.Resampling.NEAREST if factor >= 1 else Image.Resampling.LANCZOS
    shown = image.resize(size, smooth)
    of_classes = dict(zip(names, _colours(list(names.values())), strict=True))
    # The best one lies on top.
    drawn = sorted(results, key=lambda result: result["score"])
    if len(names) == 1:
        colours = _colours([str(number) for number in range(len(drawn))])
    else:
        colours = [of_classes[result["category_id"]] for result in drawn]
    panel = _with_masks(shown, drawn, colours)
    draw = ImageDraw.Draw(panel)
    for result, colour in zip(drawn, colours, strict=True):
        x, y, width, height = (factor * number for number in result["bbox"])
        draw.rectangle((x, y, x + width, y + height), outline=colour, width=2)
    for result, colour in zip(drawn, colours, strict=True):
        name = "" if len(names) == 1 else f"{names[result['category_id']][:LONGEST_NAME]} "
        x, y = (factor * number for number in result["bbox"][:2])
        _label(draw, (x, y), f"{name}{result['score']:.0%}", colour, panel.width)
    counts = Counter(result["category_id"] for result in drawn)
    entries = [
        Entry(None if len(names) == 1 else of_classes[category], f"{names[category]}: {number}")
        for category, number in counts.most_common()
    ]
    return sheet([[shown, panel]], ("image", "detections"), entries)


def _colours(names: Sequence[str]) -> list[Colour]:
    """Those of the other pictures; a class called "background" is one like any other here."""
    return [colour for colour in palette([f"{name} " for name in names]) if colour is not None]


def _with_masks(
    image: Image.Image, results: Sequence[Result], colours: Sequence[Colour]
) -> Image.Image:
    """Each mask as a tint of its colour within a line of that colour."""
    pixels = np.asarray(image, dtype=np.float32).copy()
    for result, colour in zip(results, colours, strict=True):
        stored = Image.fromarray(255 * mask_api.decode(result["segmentation"]))
        mask = stored.resize(image.size, Image.Resampling.NEAREST)
        inner = np.asarray(mask.filter(ImageFilter.MinFilter(3))) > 0
        place = np.asarray(mask) > 0
        strength = np.where(inner, OPACITY, 1.0)[place][:, None]
        pixels[place] += strength * (np.asarray(colour, dtype=np.float32) - pixels[place])
    return Image.fromarray(np.rint(pixels).astype(np.uint8))


def _label(
    draw: ImageDraw.ImageDraw, corner: tuple[float, float], text: str, colour: Colour, right: int
) -> None:
    """Letters on the colour, above a corner of a box, or below it at the image's upper edge."""
    letters = font(TEXT_SIZE)
    width, height = letters.getlength(text) + 2 * PADDING, TEXT_SIZE + 2 * PADDING
    x = max(0.0, min(corner[0], right - width))
    y = corner[1] - height if corner[1] >= height else corner[1]
    draw.rectangle((x, y, x + width, y + height), fill=colour)
    brightness = sum(share * part for share, part in zip((0.3, 0.59, 0.11), colour, strict=True))
    ink = WHITE if brightness < 150 else INK
    draw.text((x + PADDING, y + height / 2), text, fill=ink, font=letters, anchor="lm")
