"""Classes that a model knows beforehand: by the names of folders, by COCO's ids, by number."""

from __future__ import annotations

from pathlib import Path

import pytest
import segmentation_sets
import torch
from coco_sets import write_set

from fastvim.data.checks import check_data
from fastvim.data.classes import KnownClasses
from fastvim.data.detection import DetectionData
from fastvim.data.images import ImageData
from fastvim.data.segmentation import SegmentationData
from fastvim.errors import UserError

FOLDERS = {"bee": "honey bee", "ant": "garden ant", "yak": "wild yak", "cat": "tabby cat"}


@pytest.mark.parametrize("training", [True, False], ids=["with training", "without"])
def test_a_split_has_some_of_the_folders(image_root: Path, tmp_path: Path, training: bool) -> None:
    """The targets are places in the model's order, not in the folders' own."""
    for split in ("train", "val") if training else ("val",):
        (tmp_path / split).symlink_to(image_root / split)
    data = ImageData(str(tmp_path), classes=FOLDERS, img_size=16, batch_size=9, num_workers=0)
    data.setup("validate")
    _, targets = next(iter(data.val_dataloader()))
    assert targets.tolist() == [1, 1, 1, 0, 0, 0, 3, 3, 3]  # ant, bee, cat
    assert data.class_names == ["honey bee", "garden ant", "wild yak", "tabby cat"]


def test_other_folders_are_refused(image_root: Path) -> None:
    data = ImageData(str(image_root), classes={"ant": "an ant", "bee": "a bee"}, num_workers=0)
    with pytest.raises(UserError, match="class 'cat' is none of the 2 classes expected, ant, bee"):
        data.setup("validate")


def test_a_file_has_some_of_the_categories(tmp_path: Path) -> None:
    """The set's ids are 3 and 7; labels count from 1 in the order given."""
    write_set(tmp_path)
    known = {9: "tree", 7: "disc", 3: "box"}
    data = DetectionData(str(tmp_path), categories=known, img_size=64, batch_size=1, num_workers=0)
    data.setup("fit")
    assert (data.category_ids, data.class_names) == ([9, 7, 3], ["tree", "disc", "box"])
    _, (objects,) = next(iter(data.train_dataloader()))
    assert set(objects["labels"].tolist()) <= {2, 3}
    assert len(objects["labels"])


@pytest.mark.parametrize(
    ("known", "message"),
    [
        ({3: "box"}, r"category 7 \(disc\) is none of the 1 expected, 3 box; found 3 box, 7 disc"),
        ({3: "box", 7: "circle"}, "category 7 is 'disc'; expected 'circle' of 3 box, 7 circle"),
    ],
)
def test_other_categories_are_refused(tmp_path: Path, known: dict[int, str], message: str) -> None:
    write_set(tmp_path)
    with pytest.raises(UserError, match=message):
        DetectionData(str(tmp_path), categories=known).setup("validate")


def test_names_of_the_classes_of_pixels(tmp_path: Path) -> None:
    segmentation_sets.write_set(tmp_path)
    names = ["ground", "box", "disc"]
    data = SegmentationData(str(tmp_path), num_classes=3, classes=names, num_workers=0)
    data.setup("validate")
    assert data.class_names == names
    _, (classes,) = next(iter(data.val_dataloader()))
    assert set(torch.unique(classes).tolist()) == {0, 1, 2, 255}
    with pytest.raises(UserError, match=r"classes .*: expected num_classes = 4 names"):
        SegmentationData(str(tmp_path), num_classes=4, classes=names)
    (tmp_path / "names.txt").write_text("sky\nsea\nsky\n")
    twice = "two classes named sky; expected another name"
    data = SegmentationData(str(tmp_path), num_classes=3, class_file="names.txt")
    with pytest.raises(UserError, match=rf"names\.txt: {twice}"):
        check_data(data, ["train"])
    with pytest.raises(UserError, match=f"classes: {twice}"):
        SegmentationData(str(tmp_path), num_classes=2, classes=["sky", "sky"])


def test_two_folders_of_one_name(image_root: Path) -> None:
    folders = {"ant": "crane", "bee": "bee", "cat": "crane"}
    train, val = check_data(ImageData(str(image_root), classes=folders), ["train", "val"])
    assert [*train.classes] == [*val.classes] == ["crane [0]", "bee", "crane [2]"]
    assert sum(train.classes.values()) == len(train.files)


@pytest.mark.parametrize("own", [["ground", "box", "disc"], ["disc", "ground", "box"]])
def test_masks_are_mapped_by_name(tmp_path: Path, own: list[str]) -> None:
    """A file with a byte-order mark names the stored values; the weights have another order."""
    segmentation_sets.write_set(tmp_path)
    (tmp_path / "names.txt").write_text("\n".join(own) + "\n", encoding="utf-8-sig")
    known = ["box", "sky", "ground", "disc"]
    plain, mapped = (
        SegmentationData(str(tmp_path), num_classes=3, class_file="names.txt", num_workers=0)
        for _ in range(2)
    )
    mapped.known = KnownClasses("last.ckpt", known)
    for data in (plain, mapped):
        data.setup("validate")
        data.setup("test")
    assert (plain.class_names, mapped.class_names) == (own, known)
    places = torch.tensor([*(known.index(name) for name in own), 255])
    _, (before,) = next(iter(plain.test_dataloader()))
    _, (after,) = next(iter(mapped.test_dataloader()))
    assert torch.equal(places[before.clamp(max=3)], after)


def test_names_of_the_classes_of_pixels_are_compared(tmp_path: Path) -> None:
    segmentation_sets.write_set(tmp_path)
    data = SegmentationData(str(tmp_path), num_classes=3, classes=["ground", "Box", "disc"])
    data.known = KnownClasses("last.ckpt", ["ground", "box", "disc"])
    with pytest.raises(UserError, match=r"'Box' is none of the 3 classes of last\.ckpt, ground"):
        data.setup("validate")
    unnamed = SegmentationData(str(tmp_path), num_classes=3)
    unnamed.known = KnownClasses("last.ckpt", ["ground", "box", "disc"])
    unnamed.setup("validate")
    assert unnamed.class_names == ["ground", "box", "disc"]


def test_categories_that_weights_know(tmp_path: Path) -> None:
    write_set(tmp_path)
    data = DetectionData(str(tmp_path), img_size=64, batch_size=1, num_workers=0)
    data.known = KnownClasses("last.ckpt", ["tree", "disc", "box"], [9, 7, 3])
    data.setup("validate")
    assert (data.category_ids, data.class_names) == ([9, 7, 3], ["tree", "disc", "box"])
    other = DetectionData(str(tmp_path))
    other.known = KnownClasses("last.ckpt", ["box", "disc"], [7, 3])
    with pytest.raises(UserError, match=r"category 3 is 'box'; expected 'disc' of 7 box, 3 disc"):
        other.setup("validate")
