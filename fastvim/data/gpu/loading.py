"""A loader of class folders whose batches are decoded and augmented on the device."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from fastvim.data.files import Chosen, ImageFiles
from fastvim.data.gpu.decoders import why_not_decoded
from fastvim.data.gpu.files import Draw, FileReader, Files, collate
from fastvim.data.gpu.finish import DecodeAndFinish
from fastvim.data.gpu.planned import planned
from fastvim.data.gpu.sending import send
from fastvim.data.pixels import PictureReader
from fastvim.data.transforms import ImageTransform
from fastvim.data.workers import WatchedLoader
from fastvim.errors import OptionError

Decode = Literal["auto", "cpu", "gpu"]


def why_pillow(
    option: str, decode: str, device: torch.device, why_not: Callable[[], str]
) -> str | None:
    """Why Pillow decodes files, though a device was to: "" if nobody asked for that.

    Args:
        option: that says who decodes, for the message.
        decode: its value, a `Decode`.
        device: that would decode.
        why_not: why it cannot; "" if it can.

    Returns:
        None where the device decodes.

    Raises:
        UserError: "gpu" is asked for what it does not decode.
    """
    if decode == "cpu" or (decode == "auto" and device.type != "cuda"):
        return ""
    why = why_not()
    if why and decode == "gpu":
        raise OptionError(option, decode, f"cpu, as {why}")
    return why or None


def why_not_in_batches(transform: ImageTransform, read: PictureReader, device: torch.device) -> str:
    """Why a device cannot decode files in batches; "" if it can.

    Args:
        transform: of the images.
        read: whole images, as Pillow does.
        device: that decodes.
    """
    if read.mode != "RGB":
        return "the images are grey"
    if read.value_range is not None:
        return "a value_range is given"
    if planned(transform.pixels) is None:
        return "auto_augment has other operations"
    return why_not_decoded() if device.type == "cuda" else ""


def why_not_files(
    images: Any, transform: ImageTransform, read: PictureReader, device: torch.device
) -> str:
    """Likewise of the images of a dataset, which `encoded` takes if they are files."""
    files = images.dataset if isinstance(images, Chosen) else images
    if not isinstance(files, ImageFiles):
        return "the images are not files in folders"
    return why_not_in_batches(transform, read, device)


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
    loader: WatchedLoader,
    transform: ImageTransform,
    read: PictureReader,
    device: torch.device,
    training: bool,
) -> None:
    """Let a loader of `encoded` files give what one of images does.

    Args:
        loader: of `encoded` files.
        transform: of the images.
        read: whole images, as Pillow does.
        device: that decodes.
        training: replace images that cannot be read, which else are an error.
    """
    finish = DecodeAndFinish(transform, read)
    if device.type == "cuda":
        finish.warm_up(device)
    loader.collate_fn, loader.pin_memory = collate, False
    loader.finish = partial(_training if training else _evaluation, finish, device)


def _training(
    finish: DecodeAndFinish, device: torch.device, batch: tuple[Files, np.ndarray]
) -> list[Tensor]:
    images, targets = finish(*batch, device)
    return [images, send(torch.from_numpy(targets), device)]


def _evaluation(
    finish: DecodeAndFinish, device: torch.device, batch: tuple[Files, np.ndarray]
) -> list[Tensor]:
    files, targets = batch
    images, errors = finish.each(files, device)
    for error in errors.values():
        raise error
    return [images, send(torch.from_numpy(targets), device)]
