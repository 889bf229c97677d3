"""Files of instances in COCO's format."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from fault_sets.drawn import BLOCKS, ORIENTATION, Drawn, fault, named, odd


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
        mask = {"size": [48, 64], "counts": counts}  # column by column
        annotation.update(iscrowd=1, segmentation=mask, bbox=[13, 0, 5, 48], area=200)
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
def ids_as_texts(drawn: Drawn) -> None:
    for split in ("train2017", "val2017"):
        content = json.loads(instances_file(drawn, split).read_text())
        for image in content["images"]:
            image["id"] = f"img_{image['id']}"
        for annotation in content["annotations"]:
            annotation["image_id"] = f"img_{annotation['image_id']}"
        write_instances(drawn, split, content)


@odd("coco")
def crowds_as_null(drawn: Drawn) -> None:
    def change(content: dict[str, Any]) -> str:
        for annotation in content["annotations"]:
            annotation["iscrowd"] = None
        return ""

    change_instances(drawn, change)


@odd("coco")
def photographs_on_their_side(drawn: Drawn) -> None:
    """The annotations are of the upright picture."""
    for path in drawn.root.glob("*2017/*.png"):
        exif = Image.Exif()
        exif[ORIENTATION] = 6
        Image.open(path).transpose(Image.Transpose.ROTATE_90).save(path, exif=exif)


@odd("coco")
def one_grey_photograph(drawn: Drawn) -> None:
    path = drawn.pick("train2017/*.png")
    image = Image.open(path)
    image.convert("L").save(path, exif=image.getexif())


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
def polygon_of_no_finite_size(drawn: Drawn) -> str:
    wrong = [float("nan"), float("inf"), 1e9, "12", None][drawn.rng.integers(5)]
    return change_annotation(drawn, segmentation=[[4, 4, 20, 4, wrong, 20]])


@fault("coco", "stops")
def box_that_is_not_four_numbers(drawn: Drawn) -> str:
    wrong: list[Any] = [[1, 2, 3], "1 2 3 4", {"x": 1}, [1, 2, None, 4], [[1, 2], [3, 4]]]
    return change_annotation(drawn, bbox=wrong[drawn.rng.integers(len(wrong))])


@fault("coco", "stops")
def flag_that_is_a_text(drawn: Drawn) -> str:
    return change_annotation(drawn, iscrowd="maybe") + ".*iscrowd|iscrowd"


@fault("coco", "stops")
def repeated_image_ids(drawn: Drawn) -> str:
    def change(content: dict[str, Any]) -> str:
        content["images"][1]["id"] = content["images"][0]["id"]
        return "repeated image id"

    return change_instances(drawn, change)


@fault("coco", "stops")
def repeated_category_ids(drawn: Drawn) -> str:
    def change(content: dict[str, Any]) -> str:
        content["categories"].append({"id": 7, "name": "blue"})
        return "repeated category id"

    return change_instances(drawn, change)


@fault("coco", "stops")
def size_that_is_a_text(drawn: Drawn) -> str:
    def change(content: dict[str, Any]) -> str:
        image = content["images"][drawn.rng.integers(3)]
        image[drawn.rng.choice(["width", "height"])] = drawn.rng.choice(["64 px", "wide"])
        return "width|height"

    return change_instances(drawn, change)


@fault("coco", "stops")
def image_without_a_name(drawn: Drawn) -> str:
    def change(content: dict[str, Any]) -> str:
        content["images"][2]["file_name"] = None
        return "file_name"

    return change_instances(drawn, change)


@fault("coco", "stops")
def names_exchanged_in_validation(drawn: Drawn) -> str:
    def change(content: dict[str, Any]) -> str:
        content["categories"][0]["name"], content["categories"][1]["name"] = "green", "red"
        return "category.*(red|green)"

    return change_instances(drawn, change, "val2017")


@fault("coco", "warns")
def other_ids_in_validation(drawn: Drawn) -> str:
    def change(content: dict[str, Any]) -> str:
        for key, entries in (("id", "categories"), ("category_id", "annotations")):
            for entry in content[entries]:
                entry[key] -= 3
        return "taken by name.*(3 red, 7 green; found 0 red, 4 green)"

    return change_instances(drawn, change, "val2017")


@fault("coco", "stops")
def category_that_training_lacks(drawn: Drawn) -> str:
    def change(content: dict[str, Any]) -> str:
        content["categories"].append({"id": 9, "name": "blue"})
        return "blue"

    return change_instances(drawn, change, "val2017")


@fault("coco", "warns")
def category_that_never_occurs(drawn: Drawn) -> str:
    for split in ("train2017", "val2017"):
        change_instances(
            drawn, lambda c: c["categories"].append({"id": 9, "name": "blue"}) or "", split
        )
    return "class without objects.*blue"


def change_boxes(
    drawn: Drawn, change: Callable[[float, float, float, float], list[float]], masks: bool
) -> None:
    """Change all boxes of the training file; with `masks`, make the polygons those of the boxes."""

    def apply(content: dict[str, Any]) -> str:
        for annotation in content["annotations"]:
            x, y, across, down = annotation["bbox"] = change(*annotation["bbox"])
            if masks:
                right, bottom = x + across, y + down
                annotation["segmentation"] = [[x, y, right, y, right, bottom, x, bottom]]
        return ""

    change_instances(drawn, apply, "train2017")


@fault("coco", "stops")
def boxes_as_corners(drawn: Drawn) -> str:
    change_boxes(drawn, lambda x, y, across, down: [x, y, x + across, y + down], masks=False)
    return "box that fits its mask as x1, y1, x2, y2"


@fault("coco", "stops")
def shares_of_the_image(drawn: Drawn) -> str:
    change_boxes(
        drawn, lambda x, y, across, down: [x / 64, y / 48, across / 64, down / 48], masks=True
    )
    return "share|0 to 1|under a pixel"


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
