"""A loader of class folders whose batches are finished on the device, decoding included or not."""

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
from fastvim.data.gpu.files import MOST_SENT, Draw, FileReader, Files, Pixels, collate
from fastvim.data.gpu.finish import DecodeAndFinish
from fastvim.data.gpu.planned import planned, size_and_filter
from fastvim.data.gpu.sending import send
from fastvim.data.pixels import PictureReader
from fastvim.data.transforms import ImageTransform
from fastvim.data.workers import WatchedLoader
from fastvim.errors import OptionError
from fastvim.machine import cores, has_triton, shared_memory

Decode = Literal["auto", "cpu", "gpu"]
Sent = Literal["pixels", "files"]  # by loading processes, for a device to finish
PREFETCHED = 2  # batches of each loading process, torch's default


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
    if why := _why_not_planned(transform, read):
        return why
    return why_not_decoded() if device.type == "cuda" else ""


def _why_not_planned(transform: ImageTransform, read: PictureReader) -> str:
    if read.mode != "RGB":
        return "the images are grey"
    if read.value_range is not None:
        return "a value_range is given"
    if planned(transform.pixels) is None:
        return "auto_augment has other operations"
    return ""


def resized_there(
    transform: ImageTransform, read: PictureReader, device: torch.device, batch_size: int
) -> bool:
    """Whether a device crops and resizes what loading processes decode, to Pillow's own pixels.

    Args:
        transform: of the images, not of training.
        read: them, as Pillow does.
        device: that would do so.
        batch_size: images at a time; there must be room for those of all loading processes.
    """
    if not has_kernels(device) or _why_not_planned(transform, read):
        return False
    if size_and_filter(transform.pixels)[1] == "nearest":  # Pillow's is another sum
        return False
    return 3 * MOST_SENT * batch_size * cores() * PREFETCHED < shared_memory()


def has_kernels(device: torch.device) -> bool:
    """Whether a device resizes batches faster than the loading processes."""
    return device.type == "cuda" and torch.version.cuda is not None and has_triton()


def what_is_sent(
    images: Any,
    transform: ImageTransform,
    read: PictureReader,
    device: torch.device,
    option: str,
    decode: str,
    batch_size: int | None,
) -> tuple[Sent | None, str]:
    """What the loading processes send for a device to finish.

    Args:
        images: the dataset.
        transform: of the images.
        read: whole images, as Pillow does.
        device: that takes the batches.
        option: as of `why_pillow`.
        decode: likewise.
        batch_size: of evaluation; None in training, whose crops Pillow resizes otherwise.

    Returns:
        None where they finish images themselves; and why Pillow decodes, though a device was to.

    Raises:
        UserError: as of `why_pillow`.
    """
    files = isinstance(images.dataset if isinstance(images, Chosen) else images, ImageFiles)

    def why_not() -> str:
        if not files:
            return "the images are not files in folders"
        return why_not_in_batches(transform, read, device)

    why = why_pillow(option, decode, device, why_not)
    if why is None:
        return "files", ""
    exact = files and batch_size is not None and resized_there(transform, read, device, batch_size)
    return "pixels" if exact else None, why


def encoded(files: Any, transform: ImageTransform, sent: Sent) -> Dataset[Any]:
    """The same images, as files or pixels with what is drawn for them."""
    if isinstance(files, Chosen):
        return Chosen(encoded(files.dataset, transform, sent), files.indices)
    files = copy.copy(files)
    if sent == "pixels":
        files.transform = Pixels(transform.pixels)
        return files
    steps = planned(transform.pixels)
    assert steps is not None
    files.read_picture, files.transform = FileReader(files.read_picture), Draw(steps)
    return files


def finish_batches(
    loader: WatchedLoader,
    transform: ImageTransform,
    read: PictureReader,
    device: torch.device,
    sent: Sent,
    training: bool,
) -> None:
    """Let a loader of `encoded` files give what one of images does.

    Args:
        loader: of `encoded` files.
        transform: of the images.
        read: whole images, as Pillow does.
        device: that finishes the batches.
        sent: by the loading processes.
        training: replace images that cannot be read, which else are an error.
    """
    finish = DecodeAndFinish(transform, read)
    if device.type == "cuda":
        finish.warm_up(device, decoder=sent == "files")
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
