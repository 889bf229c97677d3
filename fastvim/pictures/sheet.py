"""Panels in rows on one sheet, with captions, a legend and a note.

C  channels, H W  pixels of an image
"""

from __future__ import annotations

import importlib.util
import io
import unicodedata
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from fastvim.pictures.colours import GREY, LINE, SLATE, WHITE, Colour

PANEL, LARGEST = 448, 1024  # longer side of a panel: enlarged towards the one, at most the other
MARGIN, GAP, SPACE = 14, 8, 12
TITLE_SIZE, TEXT_SIZE, NOTE_SIZE, SWATCH = 18, 14, 12, 14
_DEJAVU = "DejaVuSans.ttf"


class Panel(NamedTuple):
    """An image on a sheet.

    Attributes:
        image: RGB.
        caption: above it, in one or more lines.
        colour: of the caption and, where there is one, of the thicker frame.
        frame: width of the frame.
    """

    image: Image.Image
    caption: str = ""
    colour: Colour | str = SLATE
    frame: int = 1


class Entry(NamedTuple):
    """A line of a legend."""

    colour: Colour | None
    text: str


@cache
def _dejavu() -> str | None:
    """DejaVu Sans, out of matplotlib's folder or the system's; None where neither has it."""
    places = [_DEJAVU]  # Pillow looks for it in the system's folders
    package = importlib.util.find_spec("matplotlib")  # is not imported
    for folder in (package and package.submodule_search_locations) or ():
        places.insert(0, str(Path(folder, "mpl-data", "fonts", "ttf", _DEJAVU)))
    for place in places:
        with suppress(OSError):
            ImageFont.truetype(place)
            return place
    return None


def font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which has accents, Greek and Cyrillic; where it is not found, Pillow's own.

    It is looked for in matplotlib's folder and the system's. Pillow's has the letters of `plain`.
    """
    if found := _dejavu():
        return ImageFont.truetype(found, size)
    loaded = ImageFont.load_default(size)
    assert isinstance(loaded, ImageFont.FreeTypeFont), "Pillow was built without FreeType"
    return loaded


def plain(text: str) -> str:
    """Text without accents, which Pillow's font lacks."""
    letters = unicodedata.normalize("NFD", text)
    return "".join(letter for letter in letters if not unicodedata.combining(letter))


def written(text: str) -> str:
    """Text in letters that `font` has."""
    return plain(text) if _dejavu() is None else unicodedata.normalize("NFC", text)


def to_image(pixels: Tensor) -> Image.Image:
    """(C, H, W) in [0, 1] as RGB; of other channels than three, the first in grey."""
    if len(pixels) != 3:
        pixels = pixels[:1].expand(3, -1, -1)
    values = (pixels * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous()
    return Image.fromarray(values.cpu().numpy())


def shrink(image: Image.Image, largest: int = LARGEST, smooth: bool = True) -> Image.Image:
    """An image whose longer side is at most `largest`; not `smooth` keeps values unmixed."""
    longer = max(image.size)
    if longer <= largest:
        return image
    width, height = (max(1, round(side * largest / longer)) for side in image.size)
    method = Image.Resampling.LANCZOS if smooth else Image.Resampling.NEAREST
    return image.resize((width, height), method)


def enlarge(image: Image.Image, factor: int) -> Image.Image:
    """An image enlarged by a whole number, pixel for pixel."""
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def sheet(
    rows: Sequence[Sequence[Panel | None]],
    entries: Sequence[Entry] = (),
    *,
    title: str = "",
    note: str = "",
    size: int = PANEL,
    largest: int = LARGEST,
) -> Image.Image:
    """Panels in rows under their captions, a title above, a legend and a note below.

    Args:
        rows: the first is the longest; None in it leaves a narrow column free.
        entries: of the legend.
        title: above all.
        note: in small letters.
        size: the longer side of a small panel is enlarged by a whole number to about this.
        largest: larger panels shrink to this.

    Returns:
        RGB.
    """
    rows = [[panel and _scale(panel, size, largest) for panel in row] for row in rows]
    entries = [entry._replace(text=written(entry.text)) for entry in entries]
    title, note = written(title), written(note)
    text, small, large = font(TEXT_SIZE), font(NOTE_SIZE), font(TITLE_SIZE)
    widths = [
        max([panel.image.width, *map(text.getlength, panel.caption.split("\n"))])
        for row in rows
        for panel in row
        if panel
    ]
    column = round(max(widths))
    lefts = [MARGIN]
    for panel in rows[0]:
        lefts.append(lefts[-1] + (SPACE if panel is None else column) + GAP)
    inner = lefts[-1] - GAP - MARGIN
    heads = [max(_caption_height(panel) for panel in row if panel) for row in rows]
    bodies = [max(panel.image.height for panel in row if panel) for row in rows]
    top = MARGIN + (TITLE_SIZE + GAP if title else 0)
    bottom = top + sum(heads) + sum(bodies) + (len(rows) - 1) * GAP

    spots = _spots(entries, text, inner)
    legend = bottom + 2 * GAP
    end = legend + max(y for _, y, _ in spots) + SWATCH if spots else bottom
    # Legend, note and title may be wider than the panels.
    wide = [*(x + width for x, _, width in spots), small.getlength(note), large.getlength(title)]
    width = round(max([inner, *wide])) + 2 * MARGIN
    height = end + (NOTE_SIZE + GAP if note else 0) + MARGIN
    picture = Image.new("RGB", (width, height), WHITE)
    draw = ImageDraw.Draw(picture)
    draw.text((width / 2, MARGIN), title, fill=SLATE, font=large, anchor="mt")
    for row, head, body in zip(rows, heads, bodies, strict=True):
        for panel, left in zip(row, lefts, strict=False):
            if panel is not None:
                _draw_panel(picture, panel, left + column / 2, top + head)
        top += head + body + GAP
    for (colour, name), (x, y, _) in zip(entries, spots, strict=True):
        corner = (MARGIN + round(x), legend + y)
        box = (*corner, corner[0] + SWATCH, corner[1] + SWATCH)
        draw.rectangle(box, fill=colour, outline=colour or GREY)
        place = (corner[0] + SWATCH + GAP, corner[1] + SWATCH / 2)
        draw.text(place, name, fill=SLATE, font=text, anchor="lm")
    draw.text((MARGIN, height - MARGIN), note, fill=GREY, font=small, anchor="ls")
    return picture


def _scale(panel: Panel, size: int, largest: int) -> Panel:
    image = shrink(panel.image, largest)
    enlarged = enlarge(image, max(1, round(size / max(image.size))))
    return panel._replace(image=enlarged, caption=written(panel.caption))


def _caption_height(panel: Panel) -> int:
    return (TEXT_SIZE + GAP) * len(panel.caption.split("\n")) if panel.caption else 0


def _draw_panel(picture: Image.Image, panel: Panel, centre: float, top: int) -> None:
    """A panel, its frame around it, and the lines of its caption above."""
    draw, image = ImageDraw.Draw(picture), panel.image
    left, f = round(centre - image.width / 2), panel.frame
    box = (left - f, top - f, left + image.width + f - 1, top + image.height + f - 1)
    draw.rectangle(box, outline=LINE if panel.colour == SLATE else panel.colour, width=f)
    picture.paste(image, (left, top))
    for number, line in enumerate(reversed(panel.caption.split("\n"))):
        place = (centre, top - GAP - number * (TEXT_SIZE + GAP // 2))
        draw.text(place, line, fill=panel.colour, font=font(TEXT_SIZE), anchor="ms")


def _spots(
    entries: Sequence[Entry], text: ImageFont.FreeTypeFont, width: int
) -> list[tuple[float, int, float]]:
    """Left, top and width of each entry, in lines that fill the width."""
    spots: list[tuple[float, int, float]] = []
    x, y = 0.0, 0
    for entry in entries:
        length = SWATCH + GAP + text.getlength(entry.text)
        if x and x + length > width:
            x, y = 0.0, y + SWATCH + GAP
        spots.append((x, y, length))
        x += length + 3 * GAP
    return spots


def png(image: Image.Image) -> bytes:
    """An image as the content of a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
