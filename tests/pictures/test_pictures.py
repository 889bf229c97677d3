"""Pictures of segmentations: colours, borders, legends, and where the panels lie."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from fastvim.pictures import segmentation
from fastvim.pictures import sheet as sheets
from fastvim.pictures.colours import RED, palette
from fastvim.pictures.overlay import OPACITY, overlay
from fastvim.pictures.sheet import (
    GAP,
    MARGIN,
    SWATCH,
    TEXT_SIZE,
    Entry,
    Panel,
    font,
    plain,
    sheet,
    written,
)

NAMES = ["background", "cat", "dog"]


def grey(height: int, width: int, value: int = 100) -> Image.Image:
    return Image.new("RGB", (width, height), (value,) * 3)


def test_a_colour_for_each_class():
    colours = palette([f"class {i}" for i in range(150)])
    assert len(set(colours)) == 150
    assert RED not in colours
    assert palette(["cat", "Background", "dog"]) == [colours[0], None, colours[1]]


def test_an_overlay_has_a_tint_a_line_and_a_background():
    classes = np.zeros((12, 14), dtype=np.uint8)
    classes[2:9, 3:10] = 1
    classes[0] = 255
    drawn = np.asarray(overlay(grey(12, 14), [(classes == 1, palette(NAMES)[1])])).astype(int)
    colour = np.array(palette(NAMES)[1])
    assert (drawn[classes != 1] == 100).all()
    assert (drawn[[2, 8, 5, 5], [5, 5, 3, 9]] == colour).all()  # the line is inside the object
    tint = drawn[3:8, 4:9]
    assert (tint == tint[0, 0]).all()
    np.testing.assert_allclose(tint[0, 0], 100 + OPACITY * (colour - 100), atol=0.5)


def test_an_index_image_keeps_the_numbers(tmp_path):
    classes = np.array([[0, 1, 2], [2, 2, 1]], dtype=np.uint8)
    segmentation.index_image(classes, NAMES).save(tmp_path / "classes.png")
    with Image.open(tmp_path / "classes.png") as image:
        assert image.mode == "P"
        assert np.array_equal(np.asarray(image), classes)
        colours = np.asarray(image.convert("RGB"))
    assert tuple(colours[0, 1]) == palette(NAMES)[1]
    assert tuple(colours[0, 0]) == (0, 0, 0)


def test_a_legend_tells_shares_of_what_counts():
    classes = np.array([[0, 0, 2, 255], [0, 2, 2, 2]], dtype=np.uint8)
    entries = segmentation.legend([classes, classes[:, :2]], NAMES)
    assert [entry.text for entry in entries] == ["background 54.5%", "dog 45.5%"]
    assert [entry.colour for entry in entries] == [None, palette(NAMES)[2]]


def test_a_long_legend_is_cut():
    many = np.arange(60, dtype=np.uint8).reshape(6, 10)
    entries = segmentation.legend([many], [str(i) for i in range(60)])
    assert len(entries) == segmentation.MOST_NAMES + 1
    assert entries[-1].text == "36 more 60.0%"


def test_mistakes_are_red():
    wrong = np.zeros((3, 4), dtype=bool)
    wrong[1, 2] = True
    drawn = np.asarray(segmentation.mistakes(grey(3, 4), wrong))
    assert tuple(drawn[1, 2]) == RED
    assert (drawn[~wrong].min(axis=-1) == drawn[~wrong].max(axis=-1)).all()


@pytest.mark.parametrize(
    ("size", "shown"), [((40, 30), (440, 330)), ((500, 300), (500, 300)), ((99, 3000), (34, 1024))]
)
def test_panels_lie_side_by_side_at_a_useful_size(size, shown):
    row = [Panel(grey(*size, 50), "one"), Panel(grey(*size, 200), "two")]
    picture = sheet([row], [Entry((1, 2, 3), "cat 1.0%")])
    pixels, (height, width) = np.asarray(picture), shown
    top = MARGIN + TEXT_SIZE + GAP
    for number, value in enumerate((50, 200)):
        left = MARGIN + number * (width + GAP)
        assert (pixels[top : top + height, left : left + width] == value).all()
    assert (pixels[top + height + GAP :] == (1, 2, 3)).all(-1).any()
    assert (pixels[-MARGIN + 1 :] == 255).all()


def test_a_legend_wraps_and_is_never_cut_off():
    entries = [Entry((9, 9, 9), f"a class of a rather long name {i} 1.0%") for i in range(7)]
    picture = sheet([[Panel(grey(448, 100), "classes")]], entries)
    ink = (np.asarray(picture) != 255).any(-1)
    assert not ink[:, -MARGIN + 2 :].any()
    swatches = (np.asarray(picture) == 9).all(-1)[:, MARGIN : MARGIN + SWATCH].all(-1)
    assert (np.diff(swatches.astype(int)) == 1).sum() == 7  # one to a line


def test_a_row_has_room_for_captions_and_frames():
    short, long = Panel(grey(64, 64), "cat"), Panel(grey(64, 64), "cat\ntrue: dog", RED, frame=3)
    picture = np.asarray(sheet([[short, None, long], [short]], title="pictures", size=64))
    framed = (picture == RED).all(-1)
    assert framed[:, : MARGIN + 64].sum() == 0
    top = np.flatnonzero(framed.sum(1) > 64)[0]  # the frame's upper edge, below two lines
    assert top > MARGIN + 2 * TEXT_SIZE
    assert (framed.sum(1) > 64).sum() == 6


def test_large_classes_shrink_and_keep_their_lines():
    classes = np.zeros((100, 4000), dtype=np.uint8)
    classes[:, 2000:] = 2
    drawn = segmentation.draw_classes(grey(100, 4000), classes, NAMES)
    assert (np.asarray(drawn) == palette(NAMES)[2]).all(-1).any()
    assert drawn.width == 2 * 1024 + GAP + 2 * MARGIN


def test_names_in_other_letters_are_written_where_dejavu_is_found(monkeypatch):
    letters = "éñüλΩж"
    if font(14).getname()[0] == "DejaVu Sans":  # matplotlib, of the training extra, brings it
        missing = bytes(font(14).getmask("\uffff"))
        assert missing not in (bytes(font(14).getmask(letter)) for letter in letters)
        assert written(letters) == letters
    monkeypatch.setattr(sheets, "_dejavu", lambda: None)
    assert "DejaVu" not in font(14).getname()[0]
    assert written("café") == "cafe"


def test_names_with_accents_are_readable(monkeypatch):
    monkeypatch.setattr(sheets, "_dejavu", lambda: None)
    assert plain("Zürich café … 93%") == "Zurich cafe … 93%"
    missing = bytes(font(14).getmask("\uffff"))
    assert missing not in (bytes(font(14).getmask(letter)) for letter in plain("é…ñ"))
    plainly, accented = (
        sheet([[Panel(grey(64, 64), name)]], [Entry(RED, name)], title=name, note=name)
        for name in ("cafe", "café")
    )
    assert plainly.tobytes() == accented.tobytes()


SCRIPT = """
import sys
for name in ("lightning", "rich", "matplotlib", "faster_coco_eval", "torchmetrics", "jsonargparse"):
    sys.modules[name] = None  # importing it fails
import fastvim.pictures.detections, fastvim.pictures.predictions, fastvim.pictures.segmentation
import fastvim.pictures.reconstruction
"""


def test_the_base_install_draws():
    subprocess.run([sys.executable, "-c", SCRIPT], check=True)
