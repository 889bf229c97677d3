"""Tiny image folders."""

from __future__ import annotations

import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

CLASSES = ("ant", "bee", "cat")


def write_split(folder: Path, classes: tuple[str, ...] = CLASSES, count: int = 4) -> Path:
    """`count` JPEGs of noise in each class folder, of different sizes and contents."""
    for number, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for index in range(count):
            noise = np.random.default_rng((number, index))
            pixels = noise.integers(0, 256, (20 + index, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{index}.jpg")
    return folder


@pytest.fixture
def make_split() -> Callable[..., Path]:
    return write_split


@pytest.fixture(scope="session")
def image_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `train` (12 images) and `val` (9); not to be written to."""
    root = tmp_path_factory.mktemp("images")
    write_split(root / "train")
    write_split(root / "val", count=3)
    return root


@pytest.fixture(scope="session")
def tar_root(image_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The images of `image_root` in `train.tar` and `val.tar`; not to be written to."""
    root = tmp_path_factory.mktemp("tars")
    for split in ("train", "val"):
        with tarfile.open(root / f"{split}.tar", "w") as archive:
            archive.add(image_root / split, arcname=split)
    return root
