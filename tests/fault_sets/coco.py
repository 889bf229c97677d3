"""Files of instances in COCO's format."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from fault_sets.drawn import BLOCKS, Drawn, fault, named, odd


def write_coco(drawn: Drawn) -> None:
    for split, number in (("train2017", 5), ("val2017", 3)):
        (drawn.root / split).mkdir(parents=True)
        content: dict[str, Any] = {
            "images": [],
            "annotations": [],
            "categories": [{"id": 3, "name": "red"}, {"id": 7, "name": "green"}],
        }
        for index in range(number):
            name, image_id = f"{split}-{index}.png", 100 + index
            Image.fromarray(drawn.noise(64, 48)).save(drawn.root / split / name)
            image = {"id": image_id, "file_name": name, "width": 64, "height": 48}
            content["images"].append(image)
            for category in (3, 7):
                x, y = (int(value) for value in drawn.rng.integers(2, 14, 2))
                across, down = (int(value) for value in drawn.rng.integers(12, 20, 2))
                right, bottom = x + across, y + down
                content["annotations"].append(
                    {
                        "id": len(content["annotations"]) + 1,
                        "image_id": image_id,
                        "category_id": category,
                        "bbox": [x, y, across, down],
                        "segmentation": [[x, y, right, y, right, bottom, x, bottom]],
                        "area": across * down,
                        "iscrowd": 0,
                    }
                )
        write_instances(drawn, split, content)
    drawn.data |= {"img_size": 64, "batch_size": 2, "scale": [0.9, 1.1]}
    drawn.task |= {
        "model_args": {**BLOCKS, "img_size": 64, "norm": "layer"},
        "channels": 16,
        "pad_to": 64,
        "proposals": 16,
        "hidden_dim": 16,
        "samples": 8,
    }


def instances_file(drawn: Drawn, split: str) -> Path:
    return drawn.root / "annotations" / f"instances_{split}.json"


def write_instances(drawn: Drawn, split: str, content: dict[str, Any]) -> None:
    file = instances_file(drawn, split)
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(content))


def change_instances(
    drawn: Drawn, change: Callable[[dict[str, Any]], str], split: str | None = None
) -> str:
    """Change the file of a split, by chance the training one or the other."""
    split = split or str(drawn.rng.choice(["train2017", "val2017"]))
    content = json.loads(instances_file(drawn, split).read_text())
    pattern = change(content)
    write_instances(drawn, split, content)
    return pattern


def change_annotation(drawn: Drawn, **values: Any) -> str:
    """Change one annotation of one of the files; the pattern of its number or its image's name."""

    def change(content: dict[str, Any]) -> str:
        annotations = content["annotations"]
        annotation = annotations[drawn.rng.integers(len(annotations))]
        annotation.update(values)
        for name in [name for name, value in values.items() if value is DELETED]:
            del annotation[name]
        return rf"annotation {annotation['id']}\b"

    return change_instances(drawn, change)


DELETED = object()


@odd("coco")
def a_crowd(drawn: Drawn) -> None:
    def change(content: dict[str, Any]) -> str:
        annotation = content["annotations"][1]
        counts = [64 * 10, 200, 64 * 48 - 64 * 10 - 200]
        annotation.update(iscrowd=1, segmentation={"size": [48, 64], "counts": counts}, area=200)
        return ""

    change_instances(drawn, change)


@odd("coco")
def no_crowds_and_areas(drawn: Drawn) -> None:
    def change(content: dict[str, Any]) -> str:
        for annotation in content["annotations"]:
            del annotation["iscrowd"], annotation["area"]
        return ""

    change_instances(drawn, change)


@odd("coco")
def more_fields(drawn: Drawn) -> None:
    def change(content: dict[str, Any]) -> str:
        content |= {"info": {"year": 2020}, "licenses": [{"id": 1}]}
        content["images"][0] |= {"license": None, "coco_url": "", "date_captured": 3}
        content["annotations"][0]["attributes"] = {"occluded": False}
        content["categories"][0]["supercategory"] = "none"
        return ""

    change_instances(drawn, change)


@odd("coco")
def an_image_without_objects_in_validation(drawn: Drawn) -> None:
    def change(content: dict[str, Any]) -> str:
        last = content["images"][-1]["id"]
        content["annotations"] = [a for a in content["annotations"] if a["image_id"] != last]
        return ""

    change_instances(drawn, change, "val2017")


@odd("coco")
def one_grey_photograph(drawn: Drawn) -> None:
    path = drawn.pick("train2017/*.png")
    Image.open(path).convert("L").save(path)


@fault("coco", "stops")
def missing_photograph(drawn: Drawn) -> str:
    path = drawn.pick("*2017/*.png")
    path.unlink()
    return named(path)


@fault("coco", "stops")
def damaged_photograph(drawn: Drawn) -> str:
    path = drawn.pick("*2017/*.png")
    os.truncate(path, 200)
    return named(path)


@fault("coco", "stops")
def photograph_of_another_size(drawn: Drawn) -> str:
    path = drawn.pick("*2017/*.png")
    Image.fromarray(drawn.noise(60, 48)).save(path)
    return rf"{named(path)}.*60x48"


@fault("coco", "stops")
def unknown_category(drawn: Drawn) -> str:
    return change_annotation(drawn, category_id=91)


@fault("coco", "stops")
def unknown_image(drawn: Drawn) -> str:
    return change_annotation(drawn, image_id=99999)


@fault("coco", "stops")
def missing_segmentation(drawn: Drawn) -> str:
    return change_annotation(drawn, segmentation=drawn.rng.choice([DELETED, None]))


@fault("coco", "stops")
def missing_bbox(drawn: Drawn) -> str:
    return change_annotation(drawn, bbox=drawn.rng.choice([DELETED, None]))


@fault("coco", "stops")
def polygon_of_two_points(drawn: Drawn) -> str:
    return change_annotation(drawn, segmentation=[[4, 4, 20, 20]])


@fault("coco", "stops")
def run_lengths_that_do_not_add_up(drawn: Drawn) -> str:
    mask = {"size": [48, 64], "counts": [100, 50, 7]}
    return change_annotation(drawn, segmentation=mask)


@fault("coco", "stops")
def mask_of_another_image(drawn: Drawn) -> str:
    mask = {"size": [20, 20], "counts": [100, 50, 250]}
    return change_annotation(drawn, segmentation=mask)


@fault("coco", "stops")
def text_that_is_not_json(drawn: Drawn) -> str:
    file = instances_file(drawn, str(drawn.rng.choice(["train2017", "val2017"])))
    os.truncate(file, file.stat().st_size - 9)
    return rf"{named(file)}.*not JSON"


@fault("coco", "stops")
def no_objects_at_all(drawn: Drawn) -> str:
    def change(content: dict[str, Any]) -> str:
        content["annotations"] = []
        return "object"

    return change_instances(drawn, change, "train2017")
