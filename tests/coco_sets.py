"""Small sets of images in COCO's layout, written by the tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from faster_coco_eval.core import mask as mask_api
from PIL import Image, ImageDraw

# Neither in order nor without gaps, like COCO's.
CATEGORIES = [{"id": 7, "name": "disc"}, {"id": 3, "name": "box"}]
SIDE = 64


def disc_and_box(
    generator: np.random.Generator,
) -> tuple[Image.Image, list[tuple[int, np.ndarray]]]:
    """A red rectangle on the left, a green disc on the right, in noise; category and mask each."""
    image = Image.fromarray(generator.integers(0, 50, (SIDE, SIDE, 3), dtype=np.uint8))
    objects = []
    for category, colour in ((3, (230, 20, 20)), (7, (20, 230, 20))):
        width, height = (int(generator.integers(18, 29)) for _ in "xy")
        height = width if category == 7 else height
        left = int(generator.integers(0, 33 - width)) + (32 if category == 7 else 0)
        top = int(generator.integers(0, 65 - height))
        corners = left, top, left + width - 1, top + height - 1
        mask = Image.new("1", image.size)
        for picture, fill in ((image, colour), (mask, 1)):
            draw = ImageDraw.Draw(picture)
            (draw.rectangle if category == 3 else draw.ellipse)(corners, fill=fill)
        objects.append((category, np.array(mask)))
    return image, objects


def annotation(number: int, image_id: int, category: int, mask: np.ndarray) -> dict[str, Any]:
    """As COCO has it; the mask as compressed run lengths."""
    encoded = mask_api.encode(np.asfortranarray(mask.astype(np.uint8)))
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    left, top = int(columns[0]), int(rows[0])
    return {
        "id": number,
        "image_id": image_id,
        "category_id": category,
        "bbox": [left, top, int(columns[-1]) + 1 - left, int(rows[-1]) + 1 - top],
        "segmentation": {**encoded, "counts": encoded["counts"].decode()},
        "area": int(mask.sum()),
        "iscrowd": 0,
    }


def write_split(root: Path, split: str, count: int, seed: int = 0) -> dict[str, Any]:
    """Write images of a disc and a box each, but the last, which shows nothing; their instances."""
    generator = np.random.default_rng(seed)
    (root / split).mkdir(parents=True)
    content: dict[str, Any] = {"images": [], "annotations": [], "categories": CATEGORIES}
    for index in range(count):
        image_id = 100 + index
        image, objects = disc_and_box(generator)
        if index == count - 1:
            image, objects = Image.new("RGB", (SIDE, SIDE), (20, 25, 30)), []
        name = f"{index}.png"
        image.save(root / split / name)
        size = {"width": image.width, "height": image.height}
        content["images"].append({"id": image_id, "file_name": name, **size})
        for category, mask in objects:
            number = len(content["annotations"]) + 1
            content["annotations"].append(annotation(number, image_id, category, mask))
    write_instances(root, split, content)
    return content


def write_instances(root: Path, split: str, content: dict[str, Any]) -> None:
    (root / "annotations").mkdir(exist_ok=True)
    (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))


def write_set(root: Path, train: int = 9, val: int = 5) -> Path:
    """A training and a validation split, under COCO's names."""
    write_split(root, "train2017", train, seed=1)
    write_split(root, "val2017", val, seed=2)
    return root
