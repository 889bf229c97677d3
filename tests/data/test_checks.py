"""What a check finds in all files of a set, or in a sample of them."""

from __future__ import annotations

import gzip
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastvim.data.checks import check_data, findings
from fastvim.data.images import ImageData
from fastvim.data.issues import SplitReport
from fastvim.data.known import Known
from fastvim.data.segmentation import SegmentationData
from fastvim_cli.check import check_before_fit

NOISE = np.random.default_rng(0)


def noise(mode: str = "RGB") -> Image.Image:
    shape = (12, 16, 3) if mode == "RGB" else (12, 16)
    return Image.fromarray(NOISE.integers(0, 256, shape, dtype=np.uint8))


def write_folders(root: Path, train: int = 6, val: int = 2) -> Path:
    for split, number in (("train", train), ("val", val)):
        for name in ("cat", "dog"):
            (root / split / name).mkdir(parents=True)
            for index in range(number):
                noise().save(root / split / name / f"{index}.png")
    return root


def write_masks(root: Path, number: int, values: tuple[int, ...], split: str = "training") -> Path:
    """Masks in columns of the values, all of them in each mask."""
    for kind in ("images", "annotations"):
        (root / kind / split).mkdir(parents=True)
    mask = np.resize(np.repeat(values, 4), 16).astype(np.uint8)[None].repeat(12, 0)
    for index in range(number):
        noise().save(root / "images" / split / f"{index}.png")
        Image.fromarray(mask).save(root / "annotations" / split / f"{index}.png")
    return root


def folders(root: Path, **options) -> ImageData:
    return ImageData(str(root), img_size=16, batch_size=2, num_workers=0, **options)


def masks(root: Path, **options) -> SegmentationData:
    options = {"num_classes": 2, "reduce_zero_label": False, **options}
    return SegmentationData(str(root), img_size=16, base_size=None, **options)


def wrong(reports: list[SplitReport]) -> list[str]:
    """The kinds of what is wrong or odd, as "split: kind"."""
    errors, warnings, _ = findings(reports)
    return [*errors, *warnings]


def test_facts_of_each_split(tmp_path):
    root = write_folders(tmp_path)
    noise("L").resize((40, 30)).save(root / "train" / "dog" / "grey.jpg")
    train, val = check_data(folders(root))
    assert (train.split, val.split) == ("train", "val")
    assert train.classes == {"cat": 6, "dog": 7}
    assert train.modes == {"RGB": 12, "L": 1}
    assert train.sizes == {(16, 12): 12, (40, 30): 1}
    assert str(train).splitlines() == [
        "train: 13 images",
        "  sizes: 16x12 (12), 40x30 (1)",
        "  modes: RGB (12), L (1)",
        "  images of each class: cat (6), dog (7)",
    ]
    assert not wrong([train, val])


def test_a_class_of_damaged_images_alone(tmp_path):
    root = write_folders(tmp_path)
    for path in (root / "train" / "dog").iterdir():
        path.write_bytes(b"")
    train, _ = check_data(folders(root))
    assert train.classes == {"cat": 6, "dog": 0}
    assert (
        "class cat has all 6 images, none has class dog" in train.errors["one class in all"].first
    )


def test_a_sample_says_that_it_is_one(tmp_path):
    root = write_masks(write_masks(tmp_path, 9, (0, 1)), 5, (0, 255), "validation")
    for index in (0, 3, 5, 8):
        os.truncate(root / "images" / "training" / f"{index}.png", 60)
    train, val = check_data(masks(root), ("train", "val"), sample=5)
    assert train.read == val.read == 5
    (kind,) = train.errors
    assert kind == "unreadable image in 5 of 9 images"
    assert "sizes in 5 of 9 images: 16x12" in str(train)
    assert not val.errors  # all of it was read, and it lacks a class
    assert [report.read for report in check_data(masks(root), ("train", "val"), sample=0)] == [0, 0]
    again, _ = check_data(masks(root), ("train", "val"), sample=5)
    assert again.errors == train.errors  # drawn with the seed
    (kind,) = check_data(masks(root))[0].errors
    assert kind == "unreadable image"


def test_a_class_that_a_sample_lacks_stops_nothing(tmp_path):
    root = write_masks(write_masks(tmp_path, 8, (0, 255)), 2, (0, 1), "validation")
    errors, warnings, _ = findings(check_data(masks(root), ("train", "val"), sample=4))
    assert not errors
    assert list(warnings) == ["training: one class in all in 4 of 8 masks"]
    errors, warnings, _ = findings(check_data(masks(root), ("train", "val")))
    assert list(errors) == ["training: one class in all"]
    assert not warnings


@pytest.mark.parametrize(
    ("values", "options", "kind", "words"),
    [
        (
            (0, 255),
            {},
            "one class in all",
            ("class 0 has all 288 pixels", "none has class 1", "the value 255"),
        ),
        (
            (0, 1),
            {"reduce_zero_label": True},
            "one class in all",
            ("the value 0, which reduce_zero_label leaves out", "stored as 1 to 2"),
        ),
        ((0, 2), {"num_classes": 3}, "class without pixels", ("1",)),
        ((0, 1, 3), {"num_classes": 2}, "value out of range", ("value 3 (48 pixels)", "0 to 1")),
        ((255,), {}, "split without pixels of any class", ("the value 255",)),
    ],
)
def test_labels_that_say_nothing(tmp_path, values, options, kind, words):
    root = write_masks(write_masks(tmp_path, 3, values), 2, (0,), "validation")
    reports = check_data(masks(root, **options), ("train",))
    assert wrong(reports) == [f"training: {kind}"]
    ((_, first),) = [*reports[0].errors.values(), *reports[0].warnings.values()]
    for word in words:
        assert word in first


def test_classes_of_many_masks_may_be_rare(tmp_path):
    root = write_masks(write_masks(tmp_path, 6, (0, 1)), 2, (0, 1), "validation")
    data = masks(root, num_classes=20)
    assert not wrong(check_data(data, ("train", "val"), sample=4))
    assert wrong(check_data(data, ("train", "val"))) == ["training: class without pixels"]


def test_copies_between_splits(tmp_path):
    root = write_folders(tmp_path)
    Image.open(root / "train" / "cat" / "3.png").save(root / "val" / "dog" / "copy.bmp")
    for name in ("train/cat/white.png", "val/cat/white.png"):  # one colour says nothing
        Image.new("RGB", (16, 12), "white").save(root / name)
    _, val = check_data(folders(root))
    assert list(val.warnings) == ["image with the content of one of train"]
    ((number, first),) = val.warnings.values()
    assert number == 1
    assert first == f"{root}/val/dog/copy.bmp, as {root}/train/cat/3.png"


def test_a_picture_in_two_classes(tmp_path):
    """Labels are those of today's folders, whatever an earlier check has seen."""
    root = write_folders(tmp_path)
    check_data(folders(root))
    (root / "train" / "ant").mkdir()
    noise().save(root / "train" / "ant" / "0.png")
    for name in ("train/cat/5.png", "train/dog/copy.png"):
        Image.open(root / "train" / "cat" / "0.png").save(root / name)
    (train, _) = reports = check_data(folders(root))
    assert wrong(reports) == ["train: image with the content of one of another class"]
    ((number, first),) = train.warnings.values()
    assert (number, first.rpartition("/")[2]) == (1, "0.png")


def test_a_damaged_training_image_is_left_out(tmp_path, caplog):
    root = write_folders(tmp_path)
    os.truncate(root / "train" / "dog" / "2.png", 60)
    train, _ = reports = check_data(folders(root))
    assert list(train.dropped) == ["unreadable image"]
    assert not wrong(reports)
    check_before_fit(folders(root), with_labels=True)
    (record,) = caplog.records
    assert "dog/2.png" in record.message
    assert "left out in training" in record.message


def test_white_images_are_odd_and_one_is_not(tmp_path):
    root = write_folders(tmp_path, train=2)
    Image.new("RGB", (16, 12), "white").save(root / "train" / "cat" / "0.png")
    assert not wrong(check_data(folders(root)))
    for name in ("train/cat/1.png", "train/dog/0.png"):
        Image.new("RGB", (16, 12), "white").save(root / name)
    assert wrong(check_data(folders(root))) == ["train: image all black or all white"]


class TestWhatIsKnown:
    """What a full check has read, a later one does not read again."""

    def reads(self, data: ImageData, sample: int | None = None) -> list[int]:
        """The number of images read of each split."""
        numbers = []

        def watch(looks, doing, total):
            numbers.append(total)
            return iter(looks)

        check_data(data, ("train", "val"), sample=sample, watch=watch)
        return numbers

    def test_unchanged_files_are_not_read_again(self, tmp_path):
        root = write_folders(tmp_path)
        assert self.reads(folders(root), sample=5) == [5, 4]  # is not kept
        assert self.reads(folders(root)) == [12, 4]
        assert self.reads(folders(root)) == self.reads(folders(root), sample=5) == [0, 0]
        noise().save(root / "train" / "cat" / "1.png")
        noise().save(root / "train" / "cat" / "new.png")
        assert self.reads(folders(root)) == [2, 0]
        assert self.reads(folders(root, in_chans=1, mean=(0.5,), std=(0.5,))) == [13, 4]

    def test_a_sample_knows_what_the_full_check_found(self, tmp_path):
        root = write_folders(tmp_path, train=9)
        os.truncate(root / "val" / "dog" / "1.png", 60)
        os.truncate(root / "train" / "dog" / "7.png", 60)
        check_data(folders(root))
        train, val = check_data(folders(root), ("train", "val"), sample=1)
        assert train.read == 18
        assert list(train.dropped) == list(val.errors) == ["unreadable image"]

    @pytest.mark.parametrize(
        "damage",
        [b"", b"no gzip", gzip.compress(b"[1, 2, 3]\n"), None],
        ids=["empty", "no gzip", "another list", "no file"],
    )
    def test_a_damaged_file_knows_nothing(self, tmp_path, damage):
        root = write_folders(tmp_path)
        data = folders(root)
        known = Known([*data.reading("train"), "train"]).path
        self.reads(data)
        known.write_bytes(known.read_bytes()[:-20] if damage is None else damage)
        assert self.reads(folders(root)) == [12, 0]
        assert self.reads(folders(root)) == [0, 0]

    @pytest.mark.skipif(sys.platform == "win32" or os.geteuid() == 0, reason="writes everywhere")
    def test_a_folder_that_cannot_be_written_is_said(self, tmp_path, monkeypatch, caplog):
        monkeypatch.setattr("fastvim.data.known.cache_directory", lambda: Path("/proc"))
        self.reads(folders(write_folders(tmp_path)))
        assert "not kept" in caplog.text
