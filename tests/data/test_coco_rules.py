"""Files of instances, examined whole: every field, boxes against masks, splits, orientation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from coco_sets import annotation, write_instances, write_set
from faster_coco_eval.core import mask as mask_api
from PIL import Image

from fastvim.data.coco import read_instances
from fastvim.data.coco_rules import Geometry, judge
from fastvim.data.detection import DetectionData
from fastvim.data.run_lengths import shown
from fastvim.errors import UserError

HUGE = 10**400
DEEP = json.loads("[" * 500 + "]" * 500)


def content_of(root: Path, split: str = "train2017") -> dict[str, Any]:
    return json.loads((root / "annotations" / f"instances_{split}.json").read_text())


def data(root: Path, **options: Any) -> DetectionData:
    return DetectionData(str(root), num_workers=0, img_size=64, **options)


def refusals(root: Path, content: dict[str, Any]) -> str:
    """What check and fit say alike of a changed training file."""
    write_instances(root, "train2017", content)
    module = data(root)
    report = module.check("train")
    assert report.errors
    with pytest.raises(UserError) as caught:
        data(root).setup("fit")
    assert str(report.errors) in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(report.errors)


FIELDS = [
    *(("images", "id", value, "image: id that is not") for value in (True, 1.5, "", [1], DEEP)),
    *(
        ("images", "file_name", value, "image: file_name that is not the name of a file below")
        for value in ("/etc/1.png", "../val2017/0.png", "a/../../0.png", "a\0b", "\ud800", 7)
    ),
    ("images", "file_name", None, "image: missing file_name"),
    ("images", "file_name", "x" * 5000, "missing image file"),
    *(
        ("images", side, value, f"image: {side} that is not a whole number from 1 on")
        for side in ("width", "height")
        for value in (0, -3, "64", 64.5, True, HUGE, float("nan"), float("inf"))
    ),
    ("images", "height", None, "image: missing height"),
    *(("categories", "id", value, "category: id that is not") for value in (True, 0.5, {})),
    ("categories", "name", [], "category: missing name"),
    ("categories", "name", 1.5, "category: name that is not text"),
    *(("annotations", "image_id", value, "unknown image") for value in ("100", None, [1], HUGE)),
    *(("annotations", "category_id", value, "unknown category") for value in ("7", True, 7.5, {})),
    *(
        ("annotations", "bbox", value, "box that is not x, y, width, height")
        for value in ("1234", [1, 2, 3, "4"], [1, 2, 3, None], [1, 2, 3, True], [1, 2, 3, HUGE])
    ),
    *(("annotations", "iscrowd", value, "iscrowd that is not 0 or 1") for value in ("1", 2, [0])),
    *(("annotations", "ignore", value, "ignore that is not 0 or 1") for value in ("no", -1)),
    *(
        ("annotations", "area", value, "area that is not a number from 0 on")
        for value in (-1, "9", True, float("nan"), float("inf"))
    ),
    *(
        ("annotations", "segmentation", value, "mask that is neither polygons nor run lengths")
        for value in ("abc", 5, [None], [1, 2])
    ),
    *(
        ("annotations", "segmentation", [value], "polygon that is not numbers")
        for value in ([[1, 2], [3, 4]], [1, 2, 3, None, 5, 6], [1, 2, 3, "4", 5, 6], [True] * 6)
    ),
    ("annotations", "segmentation", [[1, 1, 5, 5, 6, 6, 7]], "polygon of fewer than three points"),
    ("annotations", "segmentation", [[1, 1, 9, 1, 9, float("nan")]], "numbers that are not finite"),
    ("annotations", "segmentation", [[1, 1, 9, 1, 9, -HUGE]], "numbers that are not finite"),
    ("annotations", "segmentation", [[1, 1, 1e9, 1, 9, 9]], "mask far outside of the image"),
    ("annotations", "bbox", [1, 1, 1e9, 9], "box far outside of the image"),
    ("annotations", "segmentation", [[0, 0, 60, 60] * 9000], "polygon longer than 100 times"),
]


@pytest.mark.parametrize(("entry", "name", "value", "kind"), FIELDS)
def test_a_field_that_is_not_what_it_must_be(tmp_path, entry, name, value, kind):
    content = content_of(write_set(tmp_path))
    content[entry][0][name] = value
    assert kind in refusals(tmp_path, content)


@pytest.mark.parametrize("entry", ["images", "annotations", "categories"])
@pytest.mark.parametrize("value", [None, "x", [1], 3])
def test_entries_that_are_no_objects(tmp_path, entry, value):
    content = content_of(write_set(tmp_path))
    content[entry].append(value)
    assert "entry that is no object" in refusals(tmp_path, content)


def test_what_is_listed_twice(tmp_path):
    content = content_of(write_set(tmp_path))
    images = content["images"]
    images[1]["id"] = images[0]["id"]
    assert f"repeated image id (first: id {images[0]['id']} of 1.png" in refusals(tmp_path, content)
    images[1] = {**images[0], "id": "another", "file_name": "./0.png"}
    assert "image listed twice" in refusals(tmp_path, content)
    images[1] = {**images[0], "id": 101, "file_name": "1.png"}
    content["categories"].append({"id": 7, "name": "again"})
    assert "repeated category id" in refusals(tmp_path, content)
    content["categories"][-1]["id"] = 8
    content["categories"][-1]["name"] = "disc"
    content["annotations"][1]["id"] = content["annotations"][0]["id"]
    write_instances(tmp_path, "train2017", content)
    report = data(tmp_path).check("train")
    assert not report.errors
    assert set(report.warnings) == {"repeated category name", "repeated annotation id"}
    assert report.classes == {"box": 8, "disc (7)": 8, "disc (8)": 0}


def test_values_that_mean_the_same(tmp_path):
    """3.0 is 3, null is nothing said, true is 1."""
    content = content_of(write_set(tmp_path))
    for each in content["annotations"]:
        each |= {"category_id": float(each["category_id"]), "iscrowd": None, "area": None}
    content["annotations"][0]["iscrowd"] = True
    content["images"][0]["width"] = 64.0
    write_instances(tmp_path, "train2017", content)
    instances = read_instances(tmp_path / "annotations/instances_train2017.json", tmp_path)
    assert not any("image file" not in kind for kind in instances.errors)
    kept = [a for record in instances.records for a in record["annotations"]]
    assert [a["iscrowd"] for a in kept[:2]] == [1, 0]
    first = content["annotations"][0]["segmentation"]
    assert kept[0]["area"] == mask_api.area({**first, "counts": first["counts"].encode()})
    assert {type(a["category_id"]) for a in kept} == {int}


def test_objects_without_end_are_refused(tmp_path):
    content = content_of(write_set(tmp_path))
    content["images"][0] |= {"width": 100_000, "height": 100_000}
    square = {"segmentation": [[0, 0, 9, 0, 9, 9, 0, 9]], "bbox": [0, 0, 9, 9]}
    for each in content["annotations"][:2]:
        each |= square
    assert "image whose masks take over 16 GiB" in refusals(tmp_path, content)


# Boxes against masks.


def judged(box: list[float], mask: Any, size: tuple[int, int] = (640, 480)) -> set[str]:
    errors, warnings = judge(Geometry.of([{"bbox": box, "segmentation": mask}], [size]))
    return {*errors.values(), *warnings.values()}


X, Y, W, H = 200.0, 150.0, 120.0, 90.0
DRAWN = [[X, Y, X + W, Y, X + W, Y + H, X, Y + H]]
SHARES = [[X / 640, Y / 480, (X + W) / 640, Y / 480, (X + W) / 640, (Y + H) / 480]]


@pytest.mark.parametrize(
    ("box", "mask", "kind"),
    [
        ([X, Y, X + W, Y + H], DRAWN, "box that fits its mask as x1, y1, x2, y2 in pixels"),
        ([X + W / 2, Y + H / 2, W, H], DRAWN, "as the centre, width, height in pixels"),
        ([Y, X, H, W], DRAWN, "as y, x, height, width in pixels"),
        ([X / 640, Y / 480, W / 640, H / 480], DRAWN, "box in shares of the image"),
        ([X / 6.4, Y / 4.8, W / 6.4, H / 4.8], DRAWN, "as x, y, width, height in per cent"),
        ([X, Y, W, H], SHARES, "mask that fits its box in shares of 1, not in pixels"),
        ([X / 640, Y / 480, W / 640, H / 480], SHARES, "box in shares of the image"),
        ([20.0, 20.0, W, H], DRAWN, "box that does not fit its mask"),
        ([600.0, Y, W, H], [[600, Y, 720, Y, 720, Y + H, 600, Y + H]], "more outside of the image"),
    ],
)
def test_boxes_that_do_not_fit(box, mask, kind):
    (found,) = judged(box, mask)
    assert kind in found


def test_sound_boxes_and_masks_say_nothing():
    """A pixel beside, cut at the border, in parts, crowds as run lengths, tiny, without a pixel."""
    generator = np.random.default_rng(0)
    for _ in range(300):
        mask = np.zeros((48, 64), dtype=bool)
        left, top = generator.integers(0, 60), generator.integers(0, 44)
        mask[top : top + generator.integers(1, 48), left : left + generator.integers(1, 64)] = True
        if generator.random() < 0.3:
            mask[generator.integers(48), generator.integers(64)] = True
        box = annotation(1, 1, 3, mask)["bbox"]
        moved = (np.array(box) + generator.uniform(-1, 1, 4)).round(2).clip(0).tolist()
        segmentation = annotation(1, 1, 3, mask)["segmentation"]
        assert not judged(moved, segmentation, (64, 48))
    part = [[X, Y, X + 9, Y, X + 9, Y + 9], [X + W - 9, Y + H, X + W, Y + H, X + W, Y + H - 9]]
    assert not judged([X, Y, W, H], part)
    assert not judged([600, Y, 40, H], [[600, Y, 655, Y, 655, Y + H, 600, Y + H]])
    assert not judged([600, Y, 55, H], [[600, Y, 640, Y, 640, Y + H, 600, Y + H]])
    assert not judged([X, Y, W, H], {"size": [480, 640], "counts": [480 * 640]})
    assert not judged([0, 0, 1, 1], [[0, 0, 1, 0, 1, 1, 0, 1]])


def test_run_lengths_are_measured_as_coco_does():
    generator = np.random.default_rng(1)
    counts: list[Any] = []
    heights, expected = [], []
    for index in range(400):
        height, width = generator.integers(1, 60, 2)
        mask = (generator.random((height, width)) < generator.choice([0, 0.01, 0.5, 1])).astype(
            "u1"
        )
        text = mask_api.encode(np.asfortranarray(mask))["counts"].decode()
        changes = np.flatnonzero(np.diff(mask.T.ravel(), prepend=0))
        numbers = np.diff(changes, prepend=0, append=mask.size).tolist()
        counts.append(numbers if index % 3 == 0 else text)
        rows, columns = np.nonzero(mask)
        edges = [0, 0, 0, 0]
        if mask.any():
            edges = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        heights.append(height)
        expected.append([mask.size, mask.sum(), *edges])
    found = shown(counts, np.array(heights))
    got = np.column_stack([found.pixels, found.area, found.bounds])
    np.testing.assert_array_equal(got, expected)


# Splits against each other, and the frame of the annotations.


def test_splits_are_compared_by_ids_and_names(tmp_path):
    content = content_of(write_set(tmp_path), "val2017")
    content["categories"] = [{"id": 7, "name": "box"}, {"id": 3, "name": "disc"}]
    write_instances(tmp_path, "val2017", content)
    module = data(tmp_path)
    module.check("train")
    assert "3 box, 7 disc; found 3 disc, 7 box" in str(module.check("val").errors)
    with pytest.raises(UserError, match="3 box, 7 disc; found 3 disc, 7 box"):
        data(tmp_path).setup("fit")


def test_a_split_with_some_of_the_categories_goes_on(tmp_path):
    content = content_of(write_set(tmp_path), "val2017")
    content["categories"] = [{"id": 7, "name": "disc"}]
    content["annotations"] = [a for a in content["annotations"] if a["category_id"] == 7]
    write_instances(tmp_path, "val2017", content)
    module = data(tmp_path)
    module.check("train")
    report = module.check("val")
    assert not report.errors
    assert report.warnings["category that a split lacks"].first.endswith("has no box")
    module.setup("fit")
    assert module.category_ids == [3, 7]


def turned(root: Path, orientation: int) -> None:
    """Store the training images, 64 x 48 when upright, with an EXIF orientation."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = content_of(root)
    for each in content["images"]:
        size = (48, 64) if orientation > 4 else (64, 48)
        Image.new("RGB", size).save(root / "train2017" / each["file_name"], exif=exif)
        each |= {"width": 64, "height": 48}
    content["annotations"] = content["annotations"][:1]
    content["annotations"][0] |= {"bbox": [0, 0, 9, 9], "segmentation": [[0, 0, 9, 0, 9, 9, 0, 9]]}
    write_instances(root, "train2017", content)


def test_the_annotated_size_tells_the_frame(tmp_path):
    turned(write_set(tmp_path), 6)
    module = data(tmp_path, train_all=True)
    look = module.opened("train").look(0)
    assert (module.frame, look.width, look.odd) == ("exif", 64, "")
    content = content_of(tmp_path)
    for each in content["images"]:
        each |= {"width": 48, "height": 64}
    write_instances(tmp_path, "train2017", content)
    module = data(tmp_path, train_all=True)
    look = module.opened("train").look(0)
    assert (module.frame, look.width, look.odd) == ("stored", 48, "")
    with pytest.raises(UserError, match="48x64 as stored, with EXIF orientation 6"):
        data(tmp_path, train_all=True, orientation="exif").opened("train").look(0)


def test_one_image_annotated_otherwise_is_read_its_own_way(tmp_path):
    turned(write_set(tmp_path), 6)
    content = content_of(tmp_path)
    content["images"][4] |= {"width": 48, "height": 64}
    write_instances(tmp_path, "train2017", content)
    look = data(tmp_path, train_all=True).opened("train").look(4)
    assert (look.width, look.odd) == (48, "image annotated another way up than others")


def test_where_both_fit_it_is_said_and_an_option_chooses(tmp_path):
    turned(write_set(tmp_path), 3)
    files = data(tmp_path, train_all=True).opened("train")
    assert "fit as stored too, taken as upright (or give --data.orientation" in files.look(0).odd
    for orientation in ("exif", "stored"):
        module = data(tmp_path, train_all=True, orientation=orientation)
        assert module.opened("train").look(0).odd == ""
        assert module.frame == orientation
    with pytest.raises(UserError, match="orientation 'left'"):
        data(tmp_path, orientation="left")


def test_files_of_a_folder_are_two_splits(tmp_path):
    write_set(tmp_path)
    content = content_of(tmp_path)
    write_instances(tmp_path, "other", content)
    other = {"val_folder": "train2017", "val_file": "annotations/instances_other.json"}
    names = [data(tmp_path, **other).check(role).split for role in ("train", "val")]
    assert names == ["instances_train2017.json", "instances_other.json"]


def test_sides_of_run_lengths_may_be_written_as_floats(tmp_path):
    content = content_of(write_set(tmp_path))
    for each in content["annotations"]:
        each["segmentation"]["size"] = [64.0, 64.0]
    write_instances(tmp_path, "train2017", content)
    module = data(tmp_path)
    assert not module.check("train").errors
    assert module.opened("train").read(0)[2].shape == (64, 64, 2)


def test_a_split_of_crowds_alone_teaches_nothing(tmp_path):
    content = content_of(write_set(tmp_path))
    for each in content["annotations"]:
        each["iscrowd"] = 1
    write_instances(tmp_path, "train2017", content)
    report = data(tmp_path).check("train")
    assert report.facts["objects"] == report.facts["crowds"] == 16
    assert report.classes == {"box": 0, "disc": 0}
