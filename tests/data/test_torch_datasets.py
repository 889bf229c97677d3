"""Datasets of torchvision by timm's names, from files in its layout and without a network."""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from torchvision.datasets import CIFAR10, mnist

from fastvim.data.images import ImageData
from fastvim.errors import UserError

PARTS = {"train": 20, "t10k": 8}


def write_digits(root: Path) -> dict[str, np.ndarray]:
    """Noise in the files of MNIST; the labels of both parts go round the ten classes."""
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True)
    images = {}
    for part, size in PARTS.items():
        pixels = np.random.default_rng(size).integers(0, 256, (size, 28, 28), dtype=np.uint8)
        labels = np.arange(size, dtype=np.uint8) % 10
        for name, array in (("images-idx3", pixels), ("labels-idx1", labels)):
            head = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, dtype=">i4").tobytes()
            (folder / f"{part}-{name}-ubyte").write_bytes(head + array.tobytes())
        images[part] = pixels
    return images


def write_colours(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of CIFAR-10: twelve images to train and four to test, of four classes."""
    folder = root / CIFAR10.base_folder
    folder.mkdir(parents=True)

    def write(name: str, content: dict[str, object]) -> str:
        raw = pickle.dumps(content)
        (folder / name).write_bytes(raw)
        return hashlib.md5(raw).hexdigest()

    for attribute, name, size in (("train_list", "train", 12), ("test_list", "test", 4)):
        pixels = np.random.default_rng(size).integers(0, 256, (size, 3072), dtype=np.uint8)
        digest = write(name, {"data": pixels, "labels": [i % 4 for i in range(size)]})
        monkeypatch.setattr(CIFAR10, attribute, [[name, digest]])
    digest = write("meta", {"label_names": ["car", "cat", "dog", "ship"]})
    meta = {"filename": "meta", "key": "label_names", "md5": digest}
    monkeypatch.setattr(CIFAR10, "meta", meta)


def open_data(root: Path | str, dataset: str, stage: str = "fit", **settings) -> ImageData:
    settings = {"img_size": 16, "batch_size": 4, "num_workers": 0, **settings}
    data = ImageData(str(root), dataset, **settings)
    data.prepare_data()
    data.setup(stage)
    return data


def test_digits(tmp_path: Path) -> None:
    images = write_digits(tmp_path)
    data = open_data(
        tmp_path, "torch/mnist", in_chans=1, img_size=28, crop_pct=1.0, mean=(0.0,), std=(1.0,)
    )
    assert data.class_names[:2] == ["0 - zero", "1 - one"]
    assert len(data.train_dataloader()) == 5
    batches = list(data.val_dataloader())
    assert torch.cat([targets for _, targets in batches]).tolist() == list(range(8))
    pixels = torch.cat([batch for batch, _ in batches]).mul(255).round().byte()
    assert np.array_equal(pixels[:, 0].numpy(), images["t10k"])


def test_colours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_colours(tmp_path, monkeypatch)
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    root = f"~/{tmp_path.name}"
    data = open_data(root, "torch/CIFAR10", train_images=9, seed=1)
    assert data.class_names == ["car", "cat", "dog", "ship"]
    first, second = (list(data.train_dataloader()) for _ in range(2))
    assert [tuple(images.shape) for images, _ in first] == [(4, 3, 16, 16)] * 2
    assert all(torch.equal(a, b) for a, b in zip(first[0], second[0], strict=True))
    assert len(open_data(root, "torch/cifar10", "test")._datasets["test"]) == 4


def test_downloaded_once_where_there_is_a_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(url: str, download_root: str, **others: object) -> None:
        if not Path(download_root, "train-images-idx3-ubyte").exists():
            Path(download_root).rmdir()
            write_digits(tmp_path)

    monkeypatch.setattr(mnist, "download_and_extract_archive", download)
    assert open_data(tmp_path, "torch/mnist", in_chans=1, mean=(0.5,), std=(0.5,)).num_classes == 10
    monkeypatch.setattr(mnist, "download_and_extract_archive", None)
    open_data(tmp_path, "torch/mnist", "test", in_chans=1, mean=(0.5,), std=(0.5,))


def test_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **settings: object) -> None:
        raise URLError("no route to host")

    monkeypatch.setattr(mnist, "download_and_extract_archive", refuse)
    with pytest.raises(
        UserError, match=r"torch/mnist: not in .*, and cannot .*no route to host"
    ) as e:
        open_data(tmp_path, "torch/mnist")
    assert "\n" not in str(e.value)
    data = ImageData(str(tmp_path), "torch/mnist")
    with pytest.raises(UserError, match=r"torch/mnist: cannot be opened in .*not found"):
        data.setup("fit")


@pytest.mark.parametrize(
    ("dataset", "settings", "message"),
    [
        ("torch/cifra10", {}, r"dataset 'torch/cifra10': .* \(nearest: torch/cifar10"),
        ("cifar10", {}, r'dataset \'cifar10\': expected "" .* \(nearest: torch/cifar10'),
        ("torch/mnist", {"train_split": "trian"}, r"split 'trian' .* \(nearest: train"),
        (
            "torch/mnist",
            {"num_classes": 9},
            "num_classes 9: expected 10, the number of classes in the data",
        ),
        ("torch/mnist", {"train_images": 21}, "train_images 21: expected 1 to 20"),
    ],
)
def test_mistakes(tmp_path: Path, dataset: str, settings: dict, message: str) -> None:
    write_digits(tmp_path)
    with pytest.raises(UserError, match=message):
        open_data(tmp_path, dataset, **settings)
