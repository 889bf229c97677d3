"""The colours of all pictures."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

Colour = tuple[int, int, int]

WHITE, LINE, GREY, SLATE, INK = "#ffffff", "#cbd5e1", "#6b7280", "#334155", "#0f172a"
BLUE, ORANGE, GREEN, VIOLET = "#2563eb", "#ea7317", "#15803d", "#7c3aed"  # of curves
RED: Colour = (220, 38, 38)  # of mistakes

# Of classes. Most readers can tell them apart; none is red.
CLASS_COLOURS: tuple[Colour, ...] = (
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


def class_colour(number: int) -> Colour:
    """A colour for each number from 0: of the list, then hues a golden angle apart."""
    if number < len(CLASS_COLOURS):
        return CLASS_COLOURS[number]
    hue = number * 0.381966 % 1
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.75, (0.95, 0.7, 0.5)[number % 3])
    return round(255 * red), round(255 * green), round(255 * blue)


def palette(class_names: Sequence[str]) -> list[Colour | None]:
    """A colour for each class, always the same; None for one called "background"."""
    colours: list[Colour | None] = []
    for name in class_names:
        number = sum(colour is not None for colour in colours)
        colours.append(None if name.lower() == "background" else class_colour(number))
    return colours
