"""Image files that a command is given: finding, reading and preparing them."""

from __future__ import annotations

import glob
from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from rich.console import Console
from rich.progress import track
from timm.data import get_img_extensions, resolve_model_data_config
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as TF

from fastvim.data.arrays import read_array
from fastvim.data.files import UNREADABLE
from fastvim.data.remote import UnreadableFileError
from fastvim.data.transforms import Transform
from fastvim.errors import UserError
from fastvim.weights import load_model

_Model = TypeVar("_Model", bound=nn.Module)


class Failure(NamedTuple):
    """A file that gave no image, and why."""

    path: Path
    reason: str


Read = Callable[[Path], Tensor]  # from a file to a prepared image (C, H, W)


def pictures(transform: Transform) -> Read:
    """Reads the image files that Pillow opens."""

    def read(path: Path) -> Tensor:
        with Image.open(path) as image:
            return transform(image)

    return read


def upright(transform: Transform) -> Transform:
    """After turning a photograph as its camera noted: a picture is for looking at."""

    def turned(image: Image.Image) -> Tensor:
        return transform(ImageOps.exif_transpose(image))

    return turned


def rgb_pixels(image: Image.Image) -> Tensor:
    """uint8 (3, H, W)."""
    return TF.pil_to_tensor(image.convert("RGB"))


def arrays(transform: Callable[[Tensor], Tensor]) -> Read:
    """Reads files of any number of channels (`fastvim.data.arrays`)."""

    def read(path: Path) -> Tensor:
        return transform(torch.from_numpy(read_array(str(path)).astype(np.float32)))

    return read


def find_images(
    patterns: list[str], endings: Collection[str] | None = None
) -> tuple[list[Path], list[Failure]]:
    """Image files that files, folders (with all below them) and globs name, each once.

    A name that leads to nothing is a failure among the others, not the end.

    Args:
        patterns: what names them.
        endings: of image files, for folders; None for what Pillow opens.
    """
    endings = get_img_extensions() if endings is None else endings
    found: dict[Path, None] = {}
    failures = []
    for pattern in patterns:
        path = Path(pattern).expanduser()
        if path.is_dir():
            files = [p for p in sorted(path.rglob("*")) if p.suffix.lower() in endings]
            reason = "a folder without images"
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
    """Files that could be read and their images (B, C, H, W); the others join `failures`."""
    remaining = iter(paths)
    while chunk := list(islice(remaining, size)):
        files, images = [], []
        for path in chunk:
            try:
                images.append(read(path))
                files.append(path)
            except UnreadableFileError as error:
                failures.append(Failure(path, str(error).removeprefix(f"{path}: ")))
            except UnidentifiedImageError:
                failures.append(Failure(path, "not an image"))
            except UNREADABLE as error:
                failures.append(Failure(path, f"damaged: {error}"))
        if files:
            yield files, torch.stack(images)


def read_upright(
    paths: list[Path], failures: list[Failure], errors: Console, doing: str
) -> Iterator[tuple[Path, Image.Image]]:
    """Files that could be read and their RGB images, one by one as they may be of any size.

    A terminal shows how far it is, and what the command is `doing`; the others join `failures`.
    """
    for (path,), pixels in track(
        read_batches(paths, pictures(upright(rgb_pixels)), 1, failures),
        doing,
        len(paths),
        console=errors,
        transient=True,
        disable=not errors.is_terminal,
    ):
        yield path, Image.fromarray(pixels[0].movedim(0, -1).numpy())


def load_trained(
    path: str, kind: type[_Model], task: str, told: Sequence[str]
) -> tuple[_Model, dict[str, Any]]:
    """A model that a task has trained, and what its file tells.

    Args:
        path: of the weights.
        kind: class of the model.
        task: such as "segmentation".
        told: what the file has to tell.

    Raises:
        UserError: weights of something else.
    """
    model, metadata = load_model(path=path)
    if not isinstance(model, kind):
        raise UserError(
            f"{path} holds {metadata['model']} without a {task} head: expected weights of "
            f"fastvim fit with a {task} task"
        )
    if missing := [name for name in told if name not in metadata]:
        raise UserError(f"{path} does not say {missing[0]}: expected weights of fastvim fit")
    return model, metadata


def free_stem(path: Path, taken: set[str]) -> str:
    """A name, without ending, for what is written of a file; no other of `taken` has it."""
    name, number = path.stem, 1
    while name in taken:
        number += 1
        name = f"{path.stem}-{number}"
    taken.add(name)
    return name


def report_failures(failures: list[Failure], errors: Console, *, read: int) -> None:
    """A line for each file that gave no image.

    Raises:
        UserError: none was read.
    """
    for failure in failures:
        errors.print(f"skipped {failure.path}: {failure.reason}", markup=False, soft_wrap=True)
    if not read:
        raise UserError(f"no image among {len(failures)} files could be read")


def image_settings(model: nn.Module, metadata: dict[str, Any]) -> dict[str, Any]:
    """How to prepare an image: as the checkpoint says, else as the model's configuration does.

    Converted weights tell of the model, not of its images: the model's options then say the size.
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
    settings["mean"], settings["std"] = tuple(settings["mean"]), tuple(settings["std"])
    return settings
