"""Files of instances in COCO's format: reading, checking, masks.

H, W: an image's height and width
"""

from __future__ import annotations

import json
import math
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from faster_coco_eval.core import mask as mask_api

from fastvim.data.issues import Issues
from fastvim.data.pixels import MISSING_IMAGE
from fastvim.errors import UserError

LEAST_SIDE = 32  # pixels of an image to train on
DAMAGED_MASK = "damaged mask"
_LISTS = ("images", "annotations", "categories")


class Records(Sequence[dict[str, Any]]):
    """JSON objects as one array of bytes, which loading processes share.

    Python objects would be copied into every process that reads them, since reading changes their
    reference counts.
    """

    def __init__(self, values: Sequence[dict[str, Any]]) -> None:
        texts = [json.dumps(value).encode() for value in values]
        self._ends = np.cumsum([len(text) for text in texts], dtype=np.int64)
        self._bytes = np.frombuffer(b"".join(texts), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        start = self._ends[index - 1] if index else 0
        return json.loads(self._bytes[start : self._ends[index]].tobytes())


@dataclass
class Instances:
    """The images of a split and the objects in them.

    Attributes:
        file: what they were read from.
        records: per image its "id", "file_name", "height", "width", and "annotations": the file's
            own, each with "bbox", "segmentation", "category_id", "area" and "iscrowd".
        category_ids: of the file's categories, in ascending order; labels 1 to K stand for them.
        class_names: of the categories, in the same order.
        errors: what a run would stop at.
        dropped: what training leaves out.
        facts: counts that are not mistakes.
    """

    file: Path
    records: Records
    category_ids: list[int]
    class_names: list[str]
    errors: Issues = field(default_factory=Issues)
    dropped: Issues = field(default_factory=Issues)
    facts: dict[str, int] = field(default_factory=dict)


def read_instances(file: Path, folder: Path, whole: bool = True) -> Instances:
    """Read and check a file of instances; mistakes in it are counted, not raised.

    Args:
        file: in COCO's format (JSON).
        folder: of the images.
        whole: False leaves out the images that the published training leaves out: those without an
            annotation, and those with a side under 32 pixels.

    Raises:
        UserError: no such file or folder, or a file that is not in COCO's format.
    """
    content = _load(file)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such directory; expected the images of {file.name}")
    try:
        categories = sorted(content["categories"], key=lambda category: category["id"])
        ids = [int(category["id"]) for category in categories]
        names = [str(category.get("name", category["id"])) for category in categories]
        images = {
            image["id"]: {
                "id": image["id"],
                "file_name": str(image["file_name"]),
                "height": int(image["height"]),
                "width": int(image["width"]),
            }
            for image in content["images"]
        }
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{file}: an image or a category without what COCO's format has ({error!r})"
        ) from error
    if not images or not ids:
        raise UserError(f"{file}: {len(images)} images, {len(ids)} categories; expected some")
    errors, dropped = Issues(), Issues()
    _find_files(images, folder, errors)
    annotations = defaultdict(list)
    known = set(ids)
    for number, annotation in enumerate(content["annotations"], 1):
        image = images.get(annotation.get("image_id"))
        where = f"annotation {annotation.get('id', number)}"
        if image is None:
            errors.add("unknown image", f"{where}, image_id {annotation.get('image_id')}")
            continue
        where += f" of {image['file_name']}"
        problem = _problem(annotation, image, known)
        if problem:
            errors.add(problem[0], f"{where}{problem[1]}")
            continue
        try:
            kept = _kept(annotation, image)
        except ValueError as error:
            errors.add(DAMAGED_MASK, f"{where}: {error}")
            continue
        if reason := _unlearned(kept, image["width"], image["height"]):
            dropped.add(reason, f"{where}, {kept['bbox']}")
        annotations[image["id"]].append(kept)
    facts = {
        "images": len(images),
        "categories": len(ids),
        "objects": sum(map(len, annotations.values())),
        "crowds": sum(a["iscrowd"] for some in annotations.values() for a in some),
        "images without objects": len(images) - len(annotations),
    }
    if not whole:
        images = _trained(images, annotations, dropped)
    records = Records([{**image, "annotations": annotations[i]} for i, image in images.items()])
    return Instances(file, records, ids, names, errors, dropped, facts)


def is_learned(annotation: dict[str, Any], width: int, height: int) -> bool:
    """Whether training learns an annotation of an image of this width and height."""
    return not annotation["iscrowd"] and not _unlearned(annotation, width, height)


def _unlearned(annotation: dict[str, Any], width: int, height: int) -> str:
    """Why training leaves out an annotation, crowds aside; "" if it does not."""
    x, y, across, down = annotation["bbox"]
    if annotation.get("ignore"):
        return "annotation marked to be ignored"
    if min(across, down) < 1:
        return "box of zero size" if min(across, down) <= 0 else "box under a pixel"
    if min(x + across, width) <= max(x, 0) or min(y + down, height) <= max(y, 0):
        return "box outside the image"
    return "" if annotation["area"] > 0 else "mask without area"


def _trained(
    images: dict[Any, dict[str, Any]], annotations: Mapping[Any, Any], dropped: Issues
) -> dict[Any, dict[str, Any]]:
    """The images to train on; the others are added to `dropped`."""
    kept = {}
    for number, image in images.items():
        if number not in annotations:
            dropped.add("image without objects", image["file_name"])
        elif min(image["width"], image["height"]) < LEAST_SIDE:
            dropped.add(f"image with a side under {LEAST_SIDE} pixels", image["file_name"])
        else:
            kept[number] = image
    return kept


def _load(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise UserError(f"{file}: no such file; expected the instances in COCO's format")
    try:
        content = json.loads(file.read_bytes())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: not JSON ({error})") from error
    if not isinstance(content, dict) or not all(isinstance(content.get(k), list) for k in _LISTS):
        raise UserError(f"{file}: expected COCO's format, with the lists {', '.join(_LISTS)}")
    return content


def _find_files(images: dict[Any, dict[str, Any]], folder: Path, errors: Issues) -> None:
    """Add missing image files to `errors`. Each folder is listed once."""
    present: dict[Path, set[str]] = {}
    for image in images.values():
        path = folder / image["file_name"]
        if path.parent not in present:
            present[path.parent] = set(os.listdir(path.parent)) if path.parent.is_dir() else set()
        if path.name not in present[path.parent]:
            errors.add(MISSING_IMAGE, str(path))


def _problem(
    annotation: dict[str, Any], image: dict[str, Any], categories: set[int]
) -> tuple[str, str] | None:
    """Why an annotation cannot be used: the kind of mistake, and details."""
    if annotation.get("category_id") not in categories:
        return "unknown category", f", category_id {annotation.get('category_id')}"
    box = annotation.get("bbox")
    if not box:
        return "missing box", ""
    try:
        usable = len(box) == 4 and all(math.isfinite(number) for number in box)
    except TypeError:
        usable = False
    if not usable:
        return "box that is not x, y, width, height", f", {box}"
    mask = annotation.get("segmentation")
    if not mask:
        return "missing mask", ""
    size = [image["height"], image["width"]]
    if isinstance(mask, dict):
        if list(mask.get("size", [])) != size or "counts" not in mask:
            return "mask of another size", f", {mask.get('size')} for {size}"
        counts = mask["counts"]
        if isinstance(counts, list) and sum(counts) != math.prod(size):
            return DAMAGED_MASK, f", {sum(counts)} pixels for {math.prod(size)}"
    elif not isinstance(mask, list) or not all(_is_polygon(part) for part in mask):
        return "polygon of fewer than three points", ""
    return None


def _is_polygon(part: Any) -> bool:
    return isinstance(part, list) and len(part) >= 6 and len(part) % 2 == 0


def _kept(annotation: dict[str, Any], image: dict[str, Any]) -> dict[str, Any]:
    """The fields that are used. A file may lack `iscrowd` and `area`."""
    names = ("category_id", "bbox", "segmentation")
    kept = {name: annotation[name] for name in names}
    kept["iscrowd"] = int(annotation.get("iscrowd", 0))
    area = annotation.get("area")
    if area is None:
        area = float(mask_api.area(encoded(kept, image["height"], image["width"])))
    return {**kept, "area": area} | ({"ignore": 1} if annotation.get("ignore") else {})


def encoded(annotation: dict[str, Any], height: int, width: int) -> dict[str, Any]:
    """The mask of an annotation, polygons or run lengths, as compressed run lengths.

    Raises:
        ValueError: run lengths that do not add up to the image.
    """
    return mask_api.segmToRle(annotation["segmentation"], width, height)


def masks_of(annotations: Sequence[dict[str, Any]], height: int, width: int) -> np.ndarray:
    """The masks of an image's annotations, uint8 (H, W, n).

    Raises:
        ValueError: run lengths that do not add up to the image.
    """
    if not annotations:
        return np.zeros((height, width, 0), dtype=np.uint8)
    return mask_api.decode([encoded(each, height, width) for each in annotations])
