"""Pictures of segmentations: classes as colours over an image, with a legend of their names.

H W  pixels of an image
"""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from fastvim.labels import IGNORE_INDEX

PANEL, LARGEST = 448, 1024  # least and greatest longer side of a panel, in pixels
MARGIN, GAP = 14, 8
TEXT_SIZE, SWATCH = 14, 14
OPACITY = 0.42
WHITE, SLATE, GREY, LINE = "#ffffff", "#334155", "#64748b", "#cbd5e1"
MISTAKE = (220, 38, 38)
MOST_NAMES = 24  # in a legend

# Told apart by most readers; red is kept for mistakes.
COLOURS = (
    (245, 158, 11),
    (14, 165, 233),
    (34, 197, 94),
    (168, 85, 247),
    (236, 72, 153),
    (20, 184, 166),
    (132, 204, 22),
    (99, 102, 241),
    (161, 98, 7),
    (100, 116, 139),
)


def font(size: int) -> ImageFont.FreeTypeFont:
    """The one of the other pictures, which comes with matplotlib."""
    path = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
    return ImageFont.truetype(str(path), size)


def palette(class_names: Sequence[str]) -> list[tuple[int, int, int] | None]:
    """A colour for each class, always the same; None for one called "background"."""
    named: list[tuple[int, int, int] | None] = []
    number = 0
    for name in class_names:
        if name.lower() == "background":
            named.append(None)
            continue
        named.append(COLOURS[number] if number < len(COLOURS) else _more(number))
        number += 1
    return named


def _more(number: int) -> tuple[int, int, int]:
    """Colours without end: hues a golden angle apart, in three brightnesses."""
    hue = number * 0.381966 % 1
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.75, (0.95, 0.7, 0.5)[number % 3])
    return round(255 * red), round(255 * green), round(255 * blue)


def index_image(classes: np.ndarray, class_names: Sequence[str]) -> Image.Image:
    """Class indices (H, W) as pixels with a palette: a viewer shows colours, black a background."""
    image = Image.fromarray(classes.astype(np.uint8))
    image.putpalette([value for colour in palette(class_names) for value in colour or (0, 0, 0)])
    return image


def overlay(image: Image.Image, classes: np.ndarray, class_names: Sequence[str]) -> Image.Image:
    """An RGB image under its classes: each a tint of its colour within a line of that colour.

    Args:
        image: RGB, of the size of the classes.
        classes: indices (H, W); those that name no class stay without a tint.
        class_names: of each class.
    """
    colours = palette(class_names)
    table = np.zeros((256, 3), dtype=np.float32)
    tinted = np.zeros(256, dtype=bool)
    for index, colour in enumerate(colours):
        if colour is not None:
            table[index], tinted[index] = colour, True
    indices = classes.astype(np.uint8)
    strength = tinted[indices] * np.where(_border(indices), 1.0, OPACITY)
    pixels = np.asarray(image, dtype=np.float32)
    mixed = pixels + strength[..., None] * (table[indices] - pixels)
    return Image.fromarray(np.rint(mixed).astype(np.uint8))


def _border(indices: np.ndarray) -> np.ndarray:
    """The pixels with another class beside or below, above or left of them, (H, W)."""
    border = np.zeros(indices.shape, dtype=bool)
    for axis in (0, 1):
        ahead, behind = [slice(None)] * 2, [slice(None)] * 2
        ahead[axis], behind[axis] = slice(1, None), slice(None, -1)
        differs = indices[tuple(ahead)] != indices[tuple(behind)]
        border[tuple(ahead)] |= differs
        border[tuple(behind)] |= differs
    return border


def mistakes(image: Image.Image, wrong: np.ndarray) -> Image.Image:
    """A paler RGB image with the wrong pixels, bool (H, W), in red."""
    pixels = 255 - 0.45 * (255 - np.asarray(image.convert("L").convert("RGB"), dtype=np.float32))
    return Image.fromarray(np.where(wrong[..., None], MISTAKE, np.rint(pixels)).astype(np.uint8))


class Entry(NamedTuple):
    """A line of a legend."""

    colour: tuple[int, int, int] | None
    text: str


def legend(classes: Sequence[np.ndarray], class_names: Sequence[str]) -> list[Entry]:
    """The classes that occur, with their share of the pixels that count, the largest ones first."""
    counts = sum(np.bincount(of.ravel(), minlength=256)[:IGNORE_INDEX] for of in classes)
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


def sheet(
    rows: Sequence[Sequence[Image.Image]], captions: Sequence[str], entries: Sequence[Entry]
) -> Image.Image:
    """Panels in rows, a caption over each column and a legend below.

    Small panels are enlarged by a whole number, pixel for pixel; large ones shrink to 1024 pixels.

    Args:
        rows: as many panels each; those of a row are of one size.
        captions: of the columns.
        entries: of the legend.

    Returns:
        RGB.
    """
    scaled = [[_scale(panel) for panel in row] for row in rows]
    text = font(TEXT_SIZE)
    widest = max(row[0].width for row in scaled)
    width = max(widest, *(round(text.getlength(caption)) for caption in captions))
    inner = len(captions) * width + (len(captions) - 1) * GAP
    places = _places(entries, text, inner)
    top = MARGIN + TEXT_SIZE + GAP
    bottom = top + sum(row[0].height + GAP for row in scaled) + GAP
    # A legend may be wider than a small panel.
    wide = max([inner, *(round(x + w) for x, _, w in places)])
    tall = bottom + max([0, *(y + SWATCH for _, y, _ in places)]) + MARGIN
    picture = Image.new("RGB", (wide + 2 * MARGIN, tall), WHITE)
    draw = ImageDraw.Draw(picture)
    for column, caption in enumerate(captions):
        centre = MARGIN + column * (width + GAP) + width / 2
        draw.text((centre, top - GAP), caption, fill=SLATE, font=text, anchor="ms")
    y = top
    for row in scaled:
        for column, panel in enumerate(row):
            left = MARGIN + column * (width + GAP) + (width - panel.width) // 2
            draw.rectangle((left - 1, y - 1, left + panel.width, y + panel.height), outline=LINE)
            picture.paste(panel, (left, y))
        y += row[0].height + GAP
    for (colour, name), (x, offset, _) in zip(entries, places, strict=True):
        corner = (MARGIN + round(x), bottom + offset)
        box = (*corner, corner[0] + SWATCH, corner[1] + SWATCH)
        draw.rectangle(box, fill=colour, outline=colour or GREY)
        place = (corner[0] + SWATCH + GAP, corner[1] + SWATCH / 2)
        draw.text(place, name, fill=SLATE, font=text, anchor="lm")
    return picture


def _scale(panel: Image.Image) -> Image.Image:
    longer = max(panel.size)
    if longer > LARGEST:
        width, height = (max(1, round(side * LARGEST / longer)) for side in panel.size)
        return panel.resize((width, height), Image.Resampling.LANCZOS)
    factor = max(1, round(PANEL / longer))
    size = (panel.width * factor, panel.height * factor)
    return panel.resize(size, Image.Resampling.NEAREST)


def _places(
    entries: Sequence[Entry], text: ImageFont.FreeTypeFont, width: int
) -> list[tuple[float, int, float]]:
    """Left, top and width of each entry, in lines that fill the width."""
    places: list[tuple[float, int, float]] = []
    x, y = 0.0, 0
    for entry in entries:
        length = SWATCH + GAP + text.getlength(entry.text)
        if x and x + length > width:
            x, y = 0.0, y + SWATCH + GAP
        places.append((x, y, length))
        x += length + 3 * GAP
    return places
