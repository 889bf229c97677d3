"""Crops of HeLa nuclei: what is written, in both layouts, and that the splits share no place."""

from __future__ import annotations

import json
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastvim.data import samples
from fastvim.data.segmentation import SegmentationData

hela = samples.load_example("hela")
FRAMES, HEIGHT, WIDTH = 2, 700, 1100


def tiff(frames: np.ndarray) -> bytes:
    """A stack of 16-bit images."""
    first, *others = [Image.fromarray(frame) for frame in frames.astype(np.uint16)]
    file = BytesIO()
    first.save(file, "TIFF", save_all=True, append_images=others)
    return file.getvalue()


@pytest.fixture(scope="module")
def stacks() -> tuple[np.ndarray, np.ndarray]:
    """Noise, and nuclei of 20 x 30 pixels a grid of 50 x 60 apart, moved from frame to frame."""
    images = np.random.default_rng(0).integers(32900, 34700, (FRAMES, HEIGHT, WIDTH))
    masks = np.zeros((FRAMES, HEIGHT, WIDTH), dtype=np.uint16)
    for frame in range(FRAMES):
        number = 0
        for top in range(5 + 10 * frame, HEIGHT - 20, 50):
            for left in range(5, WIDTH - 30, 60):
                number += 1
                masks[frame, top : top + 20, left : left + 30] = number
    return images.astype(np.uint16), masks


@pytest.fixture(scope="module")
def folder(stacks, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("hela")
    hela.build_hela([tiff(stack) for stack in stacks], path)
    return path


def crops(folder: Path, kind: str, split: str) -> dict[tuple[int, int, int], np.ndarray]:
    """The PNG files by frame, top and left."""
    files = (folder / kind / split).glob("*.png")
    return {tuple(map(int, f.stem.split("-"))): np.asarray(Image.open(f)) for f in files}


def decode(counts: list[int], height: int, width: int) -> np.ndarray:
    """COCO's run lengths, pixel by pixel."""
    pixels = []
    for place, count in enumerate(counts):
        pixels += [place % 2 == 1] * count
    return np.array(pixels).reshape(width, height).T


@pytest.mark.parametrize(("split", "count"), [("training", 4), ("validation", 2)])
def test_crops_are_of_the_stacks(folder, stacks, split, count):
    images, classes = (crops(folder, kind, split) for kind in ("images", "annotations"))
    assert len(images) == len(classes) == count * FRAMES
    for (frame, top, left), crop in images.items():
        place = np.s_[frame, top : top + 304, left : left + 304]
        light = np.clip((stacks[0][place] - 33000.0) / 1600, 0, 1)
        assert (crop.dtype, crop.shape) == (np.uint8, (304, 304))
        np.testing.assert_allclose(crop, 255 * light**0.5, atol=0.5)
        assert np.array_equal(classes[frame, top, left], stacks[1][place] > 0)


def test_the_splits_are_far_apart(folder):
    """The gap is wider than any nucleus; no crop touches the border of the frames."""
    ends = {}
    for split in ("training", "validation"):
        covered = np.zeros((HEIGHT, WIDTH), dtype=int)
        for frame, top, left in crops(folder, "images", split):
            covered[top : top + 304, left : left + 304] += frame == 0
        assert covered.max() == 1
        rows, columns = np.nonzero(covered)
        assert min(rows) >= 25
        assert max(rows) < HEIGHT - 25
        ends[split] = min(columns), max(columns)
    assert ends["training"][0] >= 25
    assert ends["validation"][0] - ends["training"][1] > 130
    assert ends["validation"][1] < WIDTH - 25


@pytest.mark.parametrize(
    ("split", "table"), [("training", "instances_train"), ("validation", "instances_val")]
)
def test_the_tables_are_the_same_nuclei(folder, stacks, split, table):
    content = json.loads((folder / "annotations" / f"{table}.json").read_text())
    assert [category["name"] for category in content["categories"]] == ["nucleus"]
    places = crops(folder, "images", split).keys()
    assert len(content["images"]) == len(places)
    ids = [annotation["id"] for annotation in content["annotations"]]
    assert len(set(ids)) == len(ids)
    for image in content["images"]:
        frame, top, left = map(int, Path(image["file_name"]).stem.split("-"))
        assert (frame, top, left) in places
        numbers = stacks[1][frame, top : top + 304, left : left + 304]
        nuclei = {n: numbers == n for n in np.unique(numbers[numbers > 0])}
        expected = [mask for mask in nuclei.values() if mask.sum() >= 30]
        found = [a for a in content["annotations"] if a["image_id"] == image["id"]]
        assert len(found) == len(expected)
        for annotation, mask in zip(found, expected, strict=True):
            assert (annotation["category_id"], annotation["iscrowd"]) == (1, 0)
            assert annotation["segmentation"]["size"] == [304, 304]
            counts = annotation["segmentation"]["counts"]
            assert np.array_equal(decode(counts, 304, 304), mask)
            assert annotation["area"] == mask.sum()
            rows, columns = np.nonzero(mask)
            x, y, width, height = annotation["bbox"]
            assert (x, x + width - 1) == (columns.min(), columns.max())
            assert (y, y + height - 1) == (rows.min(), rows.max())


@pytest.mark.parametrize("corner", [(0, 0), (3, 4), (1, 2)])
def test_run_lengths(corner):
    mask = np.zeros((4, 5), dtype=bool)
    mask[corner] = mask[1, 2] = True
    counts = hela.run_lengths(mask)
    assert sum(counts) == mask.size
    assert np.array_equal(decode(counts, 4, 5), mask)


def test_the_data_module_opens_it(folder, monkeypatch):
    monkeypatch.setattr(samples, "fetch", lambda name: folder)
    options = {"reduce_zero_label": False, "class_file": "classes.txt", "base_size": None}
    module = SegmentationData("sample:hela", num_classes=2, num_workers=0, img_size=64, **options)
    module.setup("fit")
    assert module.class_names == ["background", "nucleus"]
    images, classes = next(iter(module.train_dataloader()))
    assert images.shape == (2, 3, 64, 64)
    assert set(classes.unique().tolist()) <= {0, 1, 255}
    (image,), (classes,) = next(iter(module.val_dataloader()))
    assert image.shape == (3, 304, 304)
    assert set(classes.unique().tolist()) == {0, 1}
