"""ImageData: layouts, classes, batches, damaged files and mistakes."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import BinaryIO, ClassVar

import pytest
import torch
from PIL import Image

from fastvim.data import samples
from fastvim.data.files import MAX_UNREADABLE, ImageFiles, UnreadableImageError
from fastvim.data.images import ImageData
from fastvim.data.pixels import PictureReader
from fastvim.data.transforms import evaluation_transform
from fastvim.errors import UserError


def open_data(root: Path | str, stage: str = "fit", **settings) -> ImageData:
    settings = {"img_size": 16, "batch_size": 4, "num_workers": 0, **settings}
    data = ImageData(str(root), **settings)
    data.prepare_data()
    data.setup(stage)
    return data


def damage(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[:200])
    return path


def test_batches_of_a_folder(image_root: Path) -> None:
    data = open_data(image_root, img_size=(16, 24), eval_batch_size=5)
    assert data.class_names == ["ant", "bee", "cat"]
    assert data.num_classes == 3
    for loader, sizes in (
        (data.train_dataloader(), [4, 4, 4]),
        (data.val_dataloader(), [5, 4]),
    ):
        batches = list(loader)
        assert [len(targets) for _, targets in batches] == sizes
        for images, targets in batches:
            assert images.shape[1:] == (3, 16, 24)
            assert (images.dtype, targets.dtype) == (torch.float32, torch.int64)
    labels = torch.cat([targets for _, targets in data.val_dataloader()])
    assert labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_few_training_images(image_root: Path) -> None:
    def chosen(seed: int) -> set[str]:
        data = open_data(image_root, train_images=8, seed=seed)
        dataset = data._datasets["train"]
        assert len(data.train_dataloader()) == 2
        assert len(list(data.val_dataloader())) == 3  # all of them
        return {dataset.dataset.filename(index) for index in dataset.indices}

    assert len(chosen(0)) == 8
    assert chosen(0) == chosen(0)
    assert len({frozenset(chosen(seed)) for seed in range(5)}) > 1


def test_evaluation_is_the_public_transform(image_root: Path) -> None:
    data = open_data(image_root, "validate")
    images, _ = next(iter(data.val_dataloader()))
    with Image.open(image_root / "val" / "ant" / "0.jpg") as image:
        assert torch.equal(images[0], data.eval_transform()(image))


@pytest.mark.parametrize("workers", [0, 2])
def test_tar_files_are_the_same_data(image_root: Path, tar_root: Path, workers: int) -> None:
    folder = open_data(image_root, num_workers=workers)
    tar = open_data(tar_root, num_workers=workers)
    assert tar.class_names == folder.class_names
    for loader in ("train_dataloader", "val_dataloader"):
        expected = list(getattr(folder, loader)())
        torch.testing.assert_close(list(getattr(tar, loader)()), expected, rtol=0, atol=0)


def test_pixels_travel_and_arrive_normalised_on_the_device_of_the_trainer(image_root: Path) -> None:
    data = open_data(image_root)
    assert data.train_dataloader().dataset[0, 0][0].pixels.dtype == torch.uint8
    device = torch.device("meta")  # stands for a GPU
    strategy = SimpleNamespace(root_device=device)
    data.trainer = SimpleNamespace(global_rank=0, world_size=1, strategy=strategy)
    assert data.val_dataloader().dataset[0][0].dtype == torch.uint8
    images, targets = next(iter(data.val_dataloader()))
    assert images.dtype == torch.float32
    assert images.device == targets.device == device


def test_grey_images(image_root: Path) -> None:
    data = open_data(image_root, in_chans=1, mean=(0.5,), std=(0.5,))
    assert next(iter(data.train_dataloader()))[0].shape == (4, 1, 16, 16)


def test_evaluation_takes_the_classes_of_training(make_split: Callable, tmp_path: Path) -> None:
    make_split(tmp_path / "training", classes=("a2", "a10", "b"))
    make_split(tmp_path / "validation", classes=("a10", "b"), count=1)
    make_split(tmp_path / "test", classes=("b",), count=1)
    for stage in ("fit", "validate", "test"):
        data = open_data(tmp_path, stage)
        assert data.class_names == ["a2", "a10", "b"]  # natural order
    data.setup("fit")
    assert next(iter(data.val_dataloader()))[1].tolist() == [1, 2]
    assert next(iter(data.test_dataloader()))[1].tolist() == [2]


def test_an_unknown_class_in_evaluation(make_split: Callable, tmp_path: Path) -> None:
    make_split(tmp_path / "train")
    make_split(tmp_path / "val", classes=("ant", "dog"))
    with pytest.raises(UserError, match="val: class 'dog' is none of the 3 classes"):
        open_data(tmp_path)


def test_validation_alone(
    make_split: Callable, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_split(tmp_path / "val")
    for stage in ("validate", "test"):
        assert open_data(tmp_path, stage).num_classes == 3
    assert "no training split" in caplog.text
    with pytest.raises(UserError, match=r"no split 'train'; expected .*/train/CLASS"):
        open_data(tmp_path)


def test_stages_share_what_is_open(image_root: Path) -> None:
    data = open_data(image_root)
    train = data.train_dataloader().dataset.dataset
    data.setup("fit")
    assert data.train_dataloader().dataset.dataset is train


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_training_image_is_replaced(
    make_split: Callable, tmp_path: Path, caplog: pytest.LogCaptureFixture, workers: int
) -> None:
    make_split(tmp_path / "train")
    make_split(tmp_path / "val")
    bad = damage(tmp_path / "train" / "bee" / "1.jpg")
    data = open_data(tmp_path, num_workers=workers)
    targets = torch.cat([targets for _, targets in data.train_dataloader()])
    assert sorted(targets.tolist()) == [0] * 4 + [1] * 4 + [2] * 4
    if not workers:  # a worker's records go to its own handlers
        assert [r.levelno for r in caplog.records] == [logging.WARNING]
        assert f"{bad}: unreadable image" in caplog.text


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_in_evaluation(
    make_split: Callable, tmp_path: Path, workers: int
) -> None:
    make_split(tmp_path / "val")
    bad = damage(tmp_path / "val" / "bee" / "1.jpg")
    loader = open_data(tmp_path, "validate", num_workers=workers).val_dataloader()
    with pytest.raises(UnreadableImageError) as caught:
        list(loader)
    assert str(caught.value).startswith(f"{bad}: unreadable image (")
    assert "\n" not in str(caught.value)


def test_many_unreadable_images_in_a_row(make_split: Callable, tmp_path: Path) -> None:
    make_split(tmp_path / "train", classes=("ant",), count=MAX_UNREADABLE)
    make_split(tmp_path / "val", classes=("ant",))
    for path in (tmp_path / "train" / "ant").iterdir():
        damage(path)
    with pytest.raises(UnreadableImageError, match="the last of 10 such in a row"):
        list(open_data(tmp_path).train_dataloader())


class IndexReader:
    """What `ImageFiles` needs of a reader that gives indices and knows no names."""

    class_to_idx: ClassVar[dict[str, int]] = {}

    def __init__(self, path: Path, target: int) -> None:
        self.path = path
        self.target = target

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> tuple[BinaryIO, int]:
        return self.path.open("rb"), self.target

    def filename(self, index: int) -> None:
        return None  # as images inside a table


def test_labels_without_names(image_root: Path) -> None:
    path = image_root / "val" / "ant" / "0.jpg"
    transform = evaluation_transform(16)

    def label(target: int) -> int:
        reader = IndexReader(path, target)
        return ImageFiles(reader, "hfds/x", PictureReader(), transform, ["a", "b"], training=True)[
            0
        ][1]

    assert label(1) == 1
    for target in (-1, 2):
        with pytest.raises(UserError, match=f"hfds/x/None: label {target}; expected 0 to 1"):
            label(target)


def test_odd_folders(make_split: Callable, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere: no such directory"):
        open_data(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no split 'train'"):
        open_data(tmp_path)
    (tmp_path / "train").mkdir()
    with pytest.raises(UserError, match=r"train: no images; expected .*/CLASS/\*\.jpg, \.png"):
        open_data(tmp_path)
    flat = make_split(tmp_path / "flat")
    shutil.copytree(flat / "ant", tmp_path / "train", dirs_exist_ok=True)
    with pytest.raises(UserError, match="train: 4 of 4 images outside class folders, such as 0"):
        _ = open_data(tmp_path, val_split="flat").num_classes
    (tmp_path / "val.tar").write_bytes(b"no tar file")
    with pytest.raises(UserError, match=r"val\.tar: no images"):
        open_data(tmp_path, "validate", train_split="flat")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dataset": "imagenet"}, "dataset 'imagenet': expected .* wds/"),
        ({"dataset": "wds/x"}, "wds/x: cannot open split 'train'"),
        ({"batch_size": 0}, "batch_size 0: expected 1 or more"),
        ({"seed": -1}, "seed -1: expected 0 to 4294967295"),
        ({"num_classes": 4}, "num_classes 4: expected 3, the number of classes"),
        ({"in_chans": 2}, "in_chans 2"),
        ({"train_images": 0}, "train_images 0: expected 1 or more"),
        ({"train_images": 13}, "train_images 13: expected 1 to 12"),
    ],
)
def test_mistakes(image_root: Path, settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_data(image_root, **settings)


def test_classes_before_setup(image_root: Path) -> None:
    with pytest.raises(RuntimeError, match="call setup"):
        _ = ImageData(str(image_root)).num_classes


def test_sample_set(make_split: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_split(tmp_path / "samples" / "mnist" / "train")
    make_split(tmp_path / "samples" / "mnist" / "val", count=2)
    monkeypatch.setenv("FASTVIM_CACHE", str(tmp_path))
    assert {*samples.SAMPLES, *samples.EXAMPLES} == {"mnist", "landsat", "hela"}
    data = open_data("sample:mnist", "test")
    assert sum(len(targets) for _, targets in data.test_dataloader()) == 6
    with pytest.raises(UserError, match=r"'mnits': .* \(nearest: mnist\)"):
        open_data("sample:mnits")
