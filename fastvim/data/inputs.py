"""Image files that a trained model is given: found, read and prepared; names of its classes.

C, H, W: channels, height and width of an image
"""

from __future__ import annotations

import glob
import logging
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from timm.data import ImageNetInfo, resolve_model_data_config
from torch import Tensor, nn

from fastvim.data import channel_transforms
from fastvim.data.arrays import DECODERS, read_array
from fastvim.data.folders import describe_endings, image_endings, list_images
from fastvim.data.pixels import MAX_PIXELS, Brightest, PictureReader, stored
from fastvim.data.transforms import IMAGE_MODES, Transform, evaluation_transform
from fastvim.errors import UserError
from fastvim.models import FastChannelVim

_logger = logging.getLogger(__name__)

ALL_ENDINGS = image_endings() | set(DECODERS)  # of images for any model
Read = Callable[[Path], Tensor]  # from a file to a prepared image (C, H, W)


class Failure(NamedTuple):
    """A file that gave no image, and why."""

    path: Path
    reason: str


def find_images(
    patterns: list[str], endings: Collection[str] | None = None
) -> tuple[list[Path], list[Failure]]:
    """Image files that files, folders (with all below them) and globs name, each once.

    A name without a file is one of the failures, not an error. A line says how many files of a
    folder are left out, of which endings.

    Args:
        patterns: files, folders or globs.
        endings: of image files, for folders; None for what Pillow reads.
    """
    found: dict[Path, None] = {}
    failures = []
    for pattern in patterns:
        path = Path(os.path.expanduser(pattern))
        if path.is_dir():
            listing = list_images(path, endings)
            files, reason = [path / below for below in listing.paths], "a folder without images"
            if listing.left_out:
                _logger.warning("%s: left out %s", path, describe_endings(listing.left_out))
        elif path.exists():
            files, reason = [path], ""
        else:
            files = [Path(p) for p in sorted(glob.glob(str(path), recursive=True))]
            reason = "no such file"
        if not files:
            failures.append(Failure(path, reason))
        found.update(dict.fromkeys(files))
    return list(found), failures


def read_batches(
    paths: list[Path], read: Read, size: int, failures: list[Failure]
) -> Iterator[tuple[list[Path], Tensor]]:
    """Files that could be read and their images (B, C, H, W), in the order of the paths.

    Args:
        paths: of the files.
        read: prepares one; with `size` above 1, all images have one shape.
        size: files at a time.
        failures: gets the files that could not be read.
    """
    remaining = iter(paths)
    while chunk := list(islice(remaining, size)):
        files, images = [], []
        for path in chunk:
            try:
                images.append(read(path))
                files.append(path)
            except UserError as error:
                failures.append(Failure(path, str(error).removeprefix(f"{path}: ")))
        if files:
            yield files, torch.stack(images)


class Pictures:
    """Reads the image files that Pillow opens.

    Args:
        reader: from a file to an image.
        transform: of the image.

    Attributes:
        brightest: of what was read.
        several: files that hold further images, such as pages, which were not read.
    """

    def __init__(self, reader: Callable[[Path], Image.Image], transform: Transform) -> None:
        self.reader, self.transform = reader, transform
        self.brightest = Brightest(whole=False)
        self.several = 0

    def __call__(self, path: Path) -> Tensor:
        image = self.reader(path)
        self.brightest.add(image)
        self.several += stored(image).several
        return self.transform(image)


def arrays(transform: Callable[[Tensor], Tensor], in_chans: int, max_pixels: int | None) -> Read:
    """Reads files of a number of channels (`fastvim.data.arrays`)."""

    def read(path: Path) -> Tensor:
        array = read_array(str(path), max_pixels=max_pixels)
        if len(array) != in_chans:
            raise UserError(f"shape {array.shape}; expected ({in_chans}, height, width)")
        return transform(torch.from_numpy(array.astype(np.float32)))

    return read


def image_settings(model: nn.Module, metadata: dict[str, Any]) -> dict[str, Any]:
    """How to prepare an image: as the weights' file says, else as timm's configuration does.

    Converted weights say nothing about images: the size is then that of the model's options.

    Args:
        model: whose configuration has the defaults.
        metadata: of the weights' file.

    Returns:
        The arguments of `fastvim.data.transforms.evaluation_transform`.
    """
    options = metadata.get("model_args", {})
    told = {name: options[name] for name in ("img_size", "in_chans") if name in options}
    told |= metadata
    config = resolve_model_data_config(model)
    channels, *size = config["input_size"]
    default = {
        "img_size": tuple(size),
        "in_chans": channels,
        "mean": config["mean"],
        "std": config["std"],
        "crop_pct": config["crop_pct"],
        "interpolation": config["interpolation"],
    }
    settings = {key: told.get(key, value) for key, value in default.items()}
    for key in ("mean", "std"):  # a single value serves every channel
        values = tuple(settings[key])
        settings[key] = values * settings["in_chans"] if len(values) == 1 else values
    return settings


def picture_reader(
    metadata: dict[str, Any],
    value_range: Sequence[float] | None = None,
    max_pixels: int | None = None,
) -> PictureReader:
    """Reads pictures as the training of a model did.

    Args:
        metadata: of the weights' file.
        value_range: the values of black and white; None for those of the training.
        max_pixels: of a picture; None for `MAX_PIXELS`.
    """
    told = value_range or metadata.get("value_range")
    limits = (told[0], told[1]) if told else None
    return PictureReader("RGB", limits, max_pixels or MAX_PIXELS)


def reader(
    model: nn.Module, settings: dict[str, Any], read_picture: PictureReader
) -> tuple[Read, Collection[str]]:
    """How a classifier's images are read, and the endings of the files that it takes.

    Args:
        model: the classifier.
        settings: of `image_settings`.
        read_picture: opens an image file.
    """
    if isinstance(model, FastChannelVim):
        if read_picture.value_range is not None:
            raise UserError("value_range: a channel model takes the values as stored")
        size = (settings["img_size"], settings["mean"], settings["std"])
        transform = channel_transforms.evaluation_transform(*size)
        return arrays(transform, len(settings["mean"]), read_picture.max_pixels), DECODERS
    prepare = evaluation_transform(**settings)
    read_picture = replace(read_picture, mode=IMAGE_MODES[settings["in_chans"]])
    return Pictures(read_picture, prepare), image_endings()


def class_names(model: nn.Module, metadata: dict[str, Any]) -> list[str]:
    """Names of a model's outputs: the file's, ImageNet's for 1000 of them, else their numbers.

    Args:
        model: a classifier.
        metadata: of the weights' file.
    """
    count = int(getattr(model, "num_classes", 0))
    names = metadata.get("class_names") or []
    if len(names) == count:
        return list(names)
    if count == 1000:
        info = ImageNetInfo()
        return [info.index_to_description(i) for i in range(count)]
    return [f"class {i}" for i in range(count)]
