"""`~` is the home directory in every path of the data, in a recipe as in `--data.root=~/x`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from coco_sets import write_set
from PIL import Image

from fastvim.data.channels import ChannelData
from fastvim.data.detection import DetectionData
from fastvim.data.images import ImageData
from fastvim.data.moments import add_up, measure
from fastvim.data.remote import join, read_bytes
from fastvim.data.samples import cache_directory
from fastvim.data.segmentation import SegmentationData
from fastvim.data.table import list_images
from fastvim.inference.parts.sources import Source


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "home[1]"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.chdir(tmp_path)
    return folder


def test_images(home: Path, image_root: Path) -> None:
    (home / "photos").symlink_to(image_root)
    data = ImageData("~/photos")
    data.setup("fit")
    assert data.num_classes == 3


def test_tables(home: Path) -> None:
    for index in range(4):
        np.save(home / f"{index}.npy", np.full((2, 4, 4), index))
    rows = [f"~/{index}.npy,{index % 2},train" for index in range(4)]
    (home / "table.csv").write_text("\n".join(["path,label,split", *rows]))
    data = ChannelData("elsewhere", 2, (0.0,), (1.0,), table="~/table.csv", img_size=16)
    images = data.open("train")
    assert images.filename(3) == f"{home}/3.npy"
    assert images[3][0].shape == (2, 16, 16)
    total, used, _ = add_up(measure(list_images("~/table.csv"), workers=2))
    assert total is not None
    assert (used, total.mean.tolist()) == (4, [1.5, 1.5])
    assert join("s3://bucket", "~/x.npy") == f"{home}/x.npy"


def test_segmentation(home: Path) -> None:
    for kind, mode in (("images", "RGB"), ("annotations", "L")):
        (home / "set" / kind / "training").mkdir(parents=True)
        Image.new(mode, (8, 8)).save(home / "set" / kind / "training" / "a.png")
    (home / "names.txt").write_text("sky\nsea\n")
    data = SegmentationData("~/set", num_classes=2, class_file="~/names.txt")
    assert len(data.open("train")) == 1
    assert data.class_names == ["sky", "sea"]


def test_detection(home: Path) -> None:
    write_set(home / "set")
    folder, file = "~/set/train2017", "~/set/annotations/instances_train2017.json"
    data = DetectionData("elsewhere", train_folder=folder, train_file=file)
    assert len(data.open("train")) == 8  # one of nine shows nothing
    assert len(DetectionData("~/set").open("val")) == 5


def test_cache(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTVIM_CACHE", "~/cache")
    assert cache_directory() == home / "cache"


def test_a_name_that_begins_with_a_tilde_is_a_name(home: Path) -> None:
    """As of the files that office programs leave beside an open one."""
    Path("~$photo.png").write_bytes(b"1")
    assert list(Source(("~$photo.png",)).items(None)) == [{"path": "~$photo.png"}]
    assert read_bytes("~$photo.png") == b"1"
    assert join("~/set", "~$photo.png") == f"{home}/set/~$photo.png"
