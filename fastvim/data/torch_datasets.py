"""Datasets that torchvision downloads, under timm's names such as `torch/cifar10`."""

from __future__ import annotations

from timm.data import create_dataset
from torchvision.datasets import VisionDataset

from fastvim.data.folders import SPLIT_NAMES
from fastvim.errors import UserError, nearest

PREFIX = "torch/"
UNREADABLE = (OSError, RuntimeError, ValueError)  # what torchvision raises
NAMES = (
    *("torch/cifar10", "torch/cifar100"),
    *("torch/mnist", "torch/fashion_mnist", "torch/kmnist", "torch/qmnist"),
    *("torch/places365", "torch/imagenet"),
)
SPLITS = (*SPLIT_NAMES["train"], *SPLIT_NAMES["val"], "test")


def open_torch_dataset(name: str, root: str, split: str, download: bool = False) -> VisionDataset:
    """A split as torchvision has it, of PIL images and class indices.

    Args:
        name: one of `NAMES`.
        root: folder of the files, laid out by torchvision.
        split: one of `SPLITS`. Most of these datasets have two parts: every name but those of the
            training split means the other one.
        download: get the files from the network when they are not there. ImageNet's cannot be.

    Raises:
        UserError: for another name or split, and for files that are missing or damaged, or cannot
            be downloaded.
    """
    if name.lower() not in NAMES:
        raise UserError(
            f"dataset {name!r}: expected one of {', '.join(NAMES)}{nearest(name.lower(), NAMES)}"
        )
    if split not in SPLITS:
        raise UserError(
            f"split {split!r} of {name}: expected one of {', '.join(SPLITS)}"
            f"{nearest(split, SPLITS)}"
        )
    try:
        return create_dataset(name, root=root, split=split)
    except UNREADABLE as error:
        if not download:
            raise UserError(f"{name}: cannot be opened in {root} ({_line(error)})") from error
    # Only now: Places365 refuses to download what is there.
    try:
        return create_dataset(name, root=root, split=split, download=True)
    except UNREADABLE as error:
        raise UserError(
            f"{name}: not in {root}, and cannot be downloaded ({_line(error)}); a network is "
            "needed once"
        ) from error


def torch_class_names(dataset: VisionDataset) -> list[str]:
    """The classes in index order; of several names of one class, all."""
    names = dataset.classes
    return [name if isinstance(name, str) else ", ".join(name) for name in names]


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
