"""A loader of class folders whose batches are decoded and augmented on the device."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import Compose

from fastvim.data.files import Chosen, ImageFiles
from fastvim.data.gpu.files import Draw, FileReader, Files, collate
from fastvim.data.gpu.finish import DecodeAndFinish
from fastvim.data.gpu.planned import planned
from fastvim.data.gpu.sending import send
from fastvim.data.pixels import PictureReader
from fastvim.data.steps import Crop
from fastvim.data.transforms import ImageTransform
from fastvim.data.workers import WatchedLoader


def why_not_planned(files: Any, transform: ImageTransform, read: PictureReader) -> str:
    """Why batches of some files cannot be decoded and augmented on a device; "" if they can."""
    inner = files.dataset if isinstance(files, Chosen) else files
    if not isinstance(inner, ImageFiles):
        return "the images are not files in folders"
    if read.mode != "RGB":
        return "the images are grey"
    if read.value_range is not None:
        return "a value_range is given"
    return "" if planned(transform.pixels) is not None else "auto_augment has other operations"


def encoded(files: Any, transform: ImageTransform) -> Dataset[Any]:
    """The same images, as files with what is drawn for them."""
    if isinstance(files, Chosen):
        return Chosen(encoded(files.dataset, transform), files.indices)
    steps = planned(transform.pixels)
    assert steps is not None
    files = copy.copy(files)
    files.read_picture, files.transform = FileReader(files.read_picture), Draw(steps)
    return files


def decode_batches(
    loader: WatchedLoader, transform: ImageTransform, read: PictureReader, device: torch.device
) -> None:
    """Let a loader of `encoded` files give what one of images does.

    Args:
        loader: of `encoded` files.
        transform: of the images.
        read: whole images, as Pillow does.
        device: that decodes.
    """
    steps: Compose = transform.pixels
    crop = next(step for step in steps.transforms if isinstance(step, Crop))
    interpolation = crop.resample.name.lower()
    finish = DecodeAndFinish(transform.finish, read, tuple(crop.size), interpolation)
    if device.type == "cuda":
        finish.warm_up(device)
    loader.collate_fn, loader.pin_memory = collate, False
    loader.finish = partial(_finished, finish, device)


def _finished(
    finish: DecodeAndFinish, device: torch.device, batch: tuple[Files, np.ndarray]
) -> list[Tensor]:
    files, targets = batch
    images, places = finish(files, device)
    return [images, send(torch.from_numpy(targets[places]), device)]
