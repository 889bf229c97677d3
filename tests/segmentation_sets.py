"""A small set of images in ADE20K's layout, written by the tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

COLOURS = ("red", "lime", "blue")


def write_split(root: Path, split: str, count: int) -> None:
    """Grey noise (stored 1) with a rectangle (2), a disc (3), and a frame that does not count."""
    generator = np.random.default_rng(len(split))
    for kind in ("images", "annotations"):
        (root / kind / split).mkdir(parents=True)
    for index in range(count):
        noise = generator.integers(60, 120, (40, 48, 3), dtype=np.uint8)
        image, mask = Image.fromarray(noise), Image.new("L", (48, 40), 1)
        for stored, shape in ((2, "rectangle"), (3, "ellipse")):
            left, top = (int(generator.integers(2, 22)) for _ in "xy")
            box = (left, top, left + 16, top + 16)
            getattr(ImageDraw.Draw(image), shape)(box, fill=COLOURS[stored - 1])
            getattr(ImageDraw.Draw(mask), shape)(box, fill=stored)
        ImageDraw.Draw(mask).rectangle((0, 0, 47, 39), outline=0)
        image.save(root / "images" / split / f"{index}.png")
        mask.save(root / "annotations" / split / f"{index}.png")


def write_set(root: Path, training: int = 12, validation: int = 4) -> Path:
    """A training and a validation split, under ADE20K's names."""
    write_split(root, "training", training)
    write_split(root, "validation", validation)
    return root
