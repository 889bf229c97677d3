"""Files of instances in COCO's format: reading, checking, masks.

H, W: an image's height and width
"""

from __future__ import annotations

import gc
import json
import os
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from faster_coco_eval.core import mask as mask_api

from fastvim.data.coco_rules import (
    ANNOTATION,
    CATEGORY,
    IMAGE,
    Fault,
    Geometry,
    fault_of,
    is_id,
    judge,
    mask_fault,
    show,
)
from fastvim.data.issues import Issues
from fastvim.data.pixels import MISSING_IMAGE
from fastvim.errors import UserError, counted
from fastvim.storage import require_file

LEAST_SIDE = 32  # pixels of an image to train on
MOST_MASKED = 1 << 34  # bytes that the masks of one image may take
AT_A_TIME = 4096  # annotations that are checked together
_LISTS = ("images", "annotations", "categories")

Id = int | str


class Records(Sequence[dict[str, Any]]):
    """JSON objects as one array of bytes, which loading processes share.

    Python objects would be copied into every process that reads them, since reading changes their
    reference counts.
    """

    def __init__(self, values: Iterable[dict[str, Any]]) -> None:
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
        category_ids: of the file's categories, numbers in ascending order and then texts; labels 1
            to K stand for them.
        class_names: of the categories, in the same order.
        errors: what a run would stop at.
        dropped: what training leaves out.
        warnings: what looks odd.
        facts: counts that are not mistakes.
        objects: of each category, in the same order; those that training learns.
    """

    file: Path
    records: Records
    category_ids: list[Id]
    class_names: list[str]
    errors: Issues = field(default_factory=Issues)
    dropped: Issues = field(default_factory=Issues)
    warnings: Issues = field(default_factory=Issues)
    facts: dict[str, int] = field(default_factory=dict)
    objects: list[int] = field(default_factory=list)


@contextmanager
def _without_collection() -> Iterator[None]:
    """Python's search for circles of references takes half of the time of reading a large file."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@_without_collection()
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
    if not content["images"] or not content["categories"]:
        found = [counted(len(content[name]), name) for name in ("images", "categories")]
        raise UserError(f"{file}: {', '.join(found)}; expected some")
    instances = Instances(file, Records([]), [], [])
    errors = instances.errors
    categories = _categories(content["categories"], instances)
    images = _images(content["images"], errors)
    _find_files([image for image in images.values() if image], folder, errors)
    annotations = _annotations(content["annotations"], images, set(categories), instances)
    known = {number: image for number, image in images.items() if image}
    instances.objects = _count_learned(instances.category_ids, images, annotations)
    instances.facts = {
        "images": len(known),
        "categories": len(instances.category_ids),
        "objects": sum(map(len, annotations.values())),
        "crowds": sum(a["iscrowd"] for some in annotations.values() for a in some),
        "images without objects": len(known) - len(annotations),
    }
    if not whole:
        known = _trained(known, annotations, instances.dropped)
    records = [{**image, "annotations": annotations.get(i, [])} for i, image in known.items()]
    return replace(instances, records=Records(records))


def _categories(entries: list[Any], instances: Instances) -> dict[Id, str]:
    """Fill in ids and names of the categories, and what is wrong with them."""
    names: dict[Id, str] = {}
    for number, entry in enumerate(entries, 1):
        where = f"category {number}"
        if fault := fault_of(entry, CATEGORY):
            instances.errors.add(f"category: {fault[0]}", where + fault[1])
        elif entry["id"] in names:
            instances.errors.add("repeated category id", f"{where}, id {show(entry['id'])}")
        else:
            own = entry.get("name")
            names[_whole(entry["id"])] = str(entry["id"] if own is None else own).strip()
    instances.category_ids = sorted(names, key=_order)
    instances.class_names = [names[number] for number in instances.category_ids]
    for name, count in Counter(instances.class_names).items():
        if count > 1:
            instances.warnings.add("repeated category name", f"{name!r}, {count} times")
    return names


def _images(entries: list[Any], errors: Issues) -> dict[Id, dict[str, Any]]:
    """The images by their ids; an empty entry stands for one that has a mistake."""
    images: dict[Id, dict[str, Any]] = {}
    names: dict[str, Id] = {}
    for number, entry in enumerate(entries, 1):
        if fault := fault_of(entry, IMAGE):
            errors.add(f"image: {fault[0]}", f"image {number}{fault[1]}")
            if type(entry) is dict and is_id(entry.get("id")):
                images.setdefault(entry["id"], {})
            continue
        image_id, name = _whole(entry["id"]), entry["file_name"]
        where = f"id {show(image_id)} of {name}"
        if image_id in images:
            errors.add("repeated image id", where)
        elif (path := os.path.normpath(name)) in names:
            errors.add("image listed twice", f"{where}, and id {show(names[path])}")
            images[image_id] = {}
        else:
            names[path] = image_id
            size = {"height": int(entry["height"]), "width": int(entry["width"])}
            images[image_id] = {"id": image_id, "file_name": name, **size}
    return images


def _annotations(
    entries: list[Any],
    images: Mapping[Id, dict[str, Any]],
    categories: Collection[Id],
    instances: Instances,
) -> dict[Id, list[dict[str, Any]]]:
    """The usable annotations of each image, and what is wrong with the others."""
    kept: dict[Id, list[dict[str, Any]]] = defaultdict(list)
    seen: set[Any] = set()
    for start in range(0, len(entries), AT_A_TIME):
        chosen = []
        for number, entry in enumerate(entries[start : start + AT_A_TIME], start + 1):
            image, fault = _fault(entry, images, categories)
            if fault:
                instances.errors.add(fault[0], _where(entry, number, image) + fault[1])
            elif image:
                chosen.append((number, entry, image))
                if is_id(own := entry.get("id")):
                    if own in seen:
                        where = _where(entry, number, image)
                        instances.warnings.add("repeated annotation id", where)
                    seen.add(own)
        sizes = [(image["width"], image["height"]) for _, _, image in chosen]
        geometry = Geometry.of([entry for _, entry, _ in chosen], sizes)
        errors, warnings = judge(geometry)
        for index, (number, entry, image) in enumerate(chosen):
            if kind := errors.get(index):
                where = _where(entry, number, image) + geometry.describe(index)
                instances.errors.add(kind, where)
                continue
            annotation = _kept(entry, float(geometry.area[index]))
            kept[image["id"]].append(annotation)
            if reason := _unlearned(annotation, image["width"], image["height"]):
                where = f"{_where(entry, number, image)}, {annotation['bbox']}"
                instances.dropped.add(reason, where)
            elif (kind := warnings.get(index)) and not annotation["iscrowd"]:
                where = _where(entry, number, image) + geometry.describe(index)
                instances.warnings.add(kind, where)
    for image_id, some in kept.items():
        image = images[image_id]
        width, height = image["width"], image["height"]
        if len(some) * width * height > MOST_MASKED:
            where = f"{image['file_name']}, {len(some):,} of {width}x{height} pixels"
            instances.errors.add(f"image whose masks take over {MOST_MASKED >> 30} GiB", where)
    return kept


def _fault(
    entry: Any, images: Mapping[Id, dict[str, Any]], categories: Collection[Id]
) -> tuple[dict[str, Any], Fault | None]:
    """The image of an annotation, and why the annotation cannot be used.

    An annotation of an image that has a mistake itself is passed over: no image, no fault.
    """
    if type(entry) is not dict:
        return {}, fault_of(entry, ANNOTATION)
    number, category = entry.get("image_id"), entry.get("category_id")
    image = images.get(number) if number is not None and is_id(number) else None
    if image is None:
        return {}, ("unknown image", f", image_id {show(number)}")
    if not image:
        return {}, None
    if not is_id(category) or category not in categories:
        return image, ("unknown category", f", category_id {show(category)}")
    fault = fault_of(entry, ANNOTATION)
    return image, fault or mask_fault(entry.get("segmentation"), image["width"], image["height"])


def _where(entry: Any, number: int, image: Mapping[str, Any]) -> str:
    own = entry.get("id", number) if type(entry) is dict else number
    return f"annotation {show(own)}" + (f" of {image['file_name']}" if image else "")


def _count_learned(
    categories: Sequence[Id],
    images: Mapping[Id, dict[str, Any]],
    annotations: Mapping[Id, list[dict[str, Any]]],
) -> list[int]:
    """How many objects of each category training learns: no crowds."""
    counts: Counter[Id] = Counter()
    for number, some in annotations.items():
        width, height = images[number]["width"], images[number]["height"]
        counts.update(a["category_id"] for a in some if is_learned(a, width, height))
    return [counts[category] for category in categories]


def _kept(entry: dict[str, Any], area: float) -> dict[str, Any]:
    """The fields that are used. A file may lack `iscrowd` and `area`."""
    told = entry.get("area")
    return {
        "category_id": _whole(entry["category_id"]),
        "bbox": entry["bbox"],
        "segmentation": _plain(entry["segmentation"]),
        "iscrowd": int(entry.get("iscrowd") or 0),
        "area": area if told is None else told,
    } | ({"ignore": 1} if entry.get("ignore") else {})


def _plain(mask: Any) -> Any:
    """A mask as COCO's tools take it: JSON may have 64.0 for a side of 64."""
    return {**mask, "size": [int(side) for side in mask["size"]]} if type(mask) is dict else mask


def _whole(number: Id) -> Id:
    """An id as it is written back: JSON may have 3.0 for 3."""
    return int(number) if isinstance(number, float) else number


def _order(number: Id) -> tuple[bool, Id]:
    """Sorts ids: numbers, then texts."""
    return isinstance(number, str), number


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
    require_file(file)
    if not file.is_file():
        raise UserError(f"{file}: no such file; expected the instances in COCO's format")
    try:
        content = json.loads(file.read_bytes())
    except RecursionError as error:
        raise UserError(f"{file}: lists nested too deep; expected COCO's format") from error
    except ValueError as error:  # text that is no JSON, or a number of thousands of digits
        raise UserError(f"{file}: not JSON ({error})") from error
    if not isinstance(content, dict) or not all(isinstance(content.get(k), list) for k in _LISTS):
        raise UserError(f"{file}: expected COCO's format, with the lists {', '.join(_LISTS)}")
    return content


def _find_files(images: list[dict[str, Any]], folder: Path, errors: Issues) -> None:
    """Add missing image files to `errors`. Each folder is listed once."""
    present: dict[Path, set[str]] = {}
    for image in images:
        path = folder / image["file_name"]
        if path.parent not in present:
            try:
                present[path.parent] = set(os.listdir(path.parent))
            except OSError:  # no such folder, or a name that can be none
                present[path.parent] = set()
        if path.name not in present[path.parent]:
            errors.add(MISSING_IMAGE, str(path))


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
