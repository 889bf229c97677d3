"""Datasets that torchvision downloads, under timm's names such as `torch/cifar10`."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image
from timm.data import create_dataset
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets import VisionDataset

from fastvim.data.finishing import Drawn
from fastvim.data.folders import SPLIT_NAMES
from fastvim.data.issues import Look, look_at
from fastvim.data.transforms import ToPixels
from fastvim.errors import UserError, nearest, one_line

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
            raise UserError(f"{name}: cannot be opened in {root} ({one_line(error)})") from error
    # Only now: Places365 refuses to download what is there.
    try:
        return create_dataset(name, root=root, split=split, download=True)
    except UNREADABLE as error:
        raise UserError(
            f"{name}: not in {root}, and cannot be downloaded ({one_line(error)}); a network is "
            "needed once"
        ) from error


class TorchFiles(Dataset[tuple[Tensor | Drawn, int]]):
    """Images of a dataset of torchvision, as `transform` gives them, and their class indices.

    Args:
        source: that gives PIL images and class indices.
        name: for messages.
        to_mode: makes an image grey or RGB.
        transform: from a PIL image to a tensor, or to `Drawn`.
    """

    def __init__(
        self,
        source: VisionDataset,
        name: str,
        to_mode: Callable[[Image.Image], Image.Image],
        transform: ToPixels,
    ) -> None:
        self.source, self.name, self.to_mode, self.transform = source, name, to_mode, transform

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Tensor | Drawn, int]:
        image, target = self.source[index]
        return self.transform(self.to_mode(image)), target

    def look(self, index: int) -> Look:
        """What an image shows, for `fastvim.data.checks`."""
        image, target = self.source[index]
        return look_at(np.asarray(self.to_mode(image)), image.mode)._replace(label=int(target))

    def filename(self, index: int) -> str:
        """The image's number."""
        return f"{self.name}, image {index}"

    def sources(self, index: int) -> tuple[str, ...]:
        """None: torchvision keeps its files to itself."""
        return ()

    @property
    def targets(self) -> np.ndarray | None:
        """Class index of each image, where torchvision tells it."""
        own = getattr(self.source, "targets", None)
        if own is None:
            return None
        place = self.source.target_transform
        return np.asarray(own if place is None else [place(int(index)) for index in own])


def torch_class_names(dataset: VisionDataset) -> list[str]:
    """The classes in index order; of several names of one class, all."""
    names = dataset.classes
    return [name if isinstance(name, str) else ", ".join(name) for name in names]
