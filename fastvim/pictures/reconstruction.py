"""Pictures of what a masked autoencoder makes of images."""

from __future__ import annotations

import math

from PIL import Image

from fastvim.pictures.sheet import Panel, sheet, to_image
from fastvim.reconstruction import Reconstruction

SIZE = 224  # pixels that the longer side of a panel comes closest to by whole enlargement
STACKED = 3  # images in one column; more are drawn in two groups of columns
NOTE = "brightness and contrast of each patch are the original's (norm_pix_loss)"


def draw_reconstruction(result: Reconstruction) -> Image.Image:
    """Four panels an image: original, masked, reconstruction, visible patches pasted in.

    A line below tells where predictions were given the originals' means and deviations. Other
    channel counts than 1 and 3 have no colours: their first channel is shown.

    Returns:
        RGB. Up to three images stand below one another, more in two groups of columns.
    """
    names = ("original", f"{result.hidden:.0%} masked", "reconstruction", "visible pasted in")
    count = len(result.original)
    height = count if count <= STACKED else math.ceil(count / 2)
    rows: list[list[Panel | None]] = [[] for _ in range(height)]
    for number, images in enumerate(zip(*result[:4], strict=True)):
        row = rows[number % height]
        captions = names if row is rows[0] else [""] * 4
        row += [None] if row else []
        row += [Panel(to_image(i), name) for i, name in zip(images, captions, strict=True)]
    return sheet(rows, note=NOTE if result.normalised else "", size=SIZE)
