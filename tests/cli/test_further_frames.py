"""Commands read the first image of a file, and say so where it holds more."""

from __future__ import annotations

import numpy as np
from PIL import Image
from torchvision.transforms.v2.functional import pil_to_tensor

from fastvim.data.pixels import PictureReader
from fastvim.inference.inputs import Pictures, Seen


def test_files_of_several_images_are_counted(tmp_path):
    frames = [Image.fromarray(np.full((8, 8, 3), 60 * i, dtype=np.uint8)) for i in range(3)]
    for name in ("moving.gif", "pages.tif"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
    frames[1].save(tmp_path / "one.png")
    heard = Seen()
    for names, number in (("one.png",), 0), (("one.png", "moving.gif"), 1), (("pages.tif",), 2):
        read = Pictures(PictureReader(), pil_to_tensor)
        for name in names:
            read(str(tmp_path / name))
        heard.add(read.told())
        said = f"{number} x file of several images, of which the first is read"
        assert heard.remarks == ([said] if number else [])
