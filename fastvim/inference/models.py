"""The model that a command works with, and what every work with a model has."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastvim.data.pixels import PictureReader
from fastvim.errors import UserError
from fastvim.inference.exported import open_exported
from fastvim.inference.inputs import Seen, picture_reader
from fastvim.inference.parts.work import Item, Read
from fastvim.models import (
    CascadeMaskRCNN,
    FastChannelVim,
    FeatureMaps,
    MaskedAutoencoder,
    UPerNet,
)
from fastvim.weights import is_file_name, load_model

PROGRAMS = (".onnx", ".pt2")  # exported ones


@dataclass(frozen=True)
class ModelChoice:
    """Which weights, in which model.

    Args:
        name: of published weights or of a model, or a file of weights.
        file: weights for a model of that name; without a name the file says which.
        ema: as of `fastvim.load_model`.
        options: of the model, over those that the weights tell.
    """

    name: str | None
    file: str | None = None
    ema: bool | None = None
    options: dict[str, Any] = field(default_factory=dict)


def load_for(
    command: str, choice: ModelChoice, required: Collection[str] = ()
) -> tuple[nn.Module, dict[str, Any]]:
    """A model, and the metadata of its weights.

    Args:
        command: that the model is for.
        choice: of the model.
        required: keys of the metadata.

    Raises:
        UserError: weights of a model for another command, or without what is required.
    """
    model, metadata = load(choice)
    source = choice.file or choice.name
    kind, commands = _kind(model)
    if command not in commands:
        raise UserError(f"{source} is {kind}: see fastvim {commands[0]}")
    if missing := [key for key in required if key not in metadata]:
        raise UserError(f"{source} does not say {missing[0]}: expected weights of fastvim fit")
    return model, metadata


def load(choice: ModelChoice) -> tuple[nn.Module, dict[str, Any]]:
    """A model of any kind, and the metadata of its weights.

    Raises:
        UserError: as `load_model`; a file of a program that is not run here.
    """
    name, file = choice.name, choice.file
    if name is not None and (is_file_name(name) or name.endswith(PROGRAMS)):
        name, file = None, name
    try:
        if file is not None and file.endswith(PROGRAMS):
            model, metadata = _exported(name, file, choice)
        else:
            model, metadata = load_model(name, file, ema=choice.ema, **choice.options)
    except TypeError as error:
        if not choice.options:
            raise
        given = " ".join(f"{name}={json.dumps(value)}" for name, value in choice.options.items())
        raise UserError(f"--model-arg {given}: a value of another type ({error})") from error
    return model, metadata


def _exported(name: str | None, file: str, choice: ModelChoice) -> tuple[nn.Module, dict[str, Any]]:
    """The model of an ONNX file; programs of torch are not run."""
    if not file.endswith(".onnx"):
        raise UserError(
            f"{file}: a program of torch, which may hold code, is not run here; expected .onnx, or "
            "load it in Python (torch.export.load)"
        )
    if choice.options or choice.ema is not None or name is not None:
        raise UserError(
            f"{file}: an exported file takes no other name, --model-arg, --ema or --raw"
        )
    return open_exported(Path(os.path.expanduser(file)))


def _kind(model: nn.Module) -> tuple[str, tuple[str, ...]]:
    """What a model is, and the commands that use it."""
    if isinstance(model, MaskedAutoencoder):
        return "a masked autoencoder", ("reconstruct",)
    if isinstance(model, UPerNet):
        return "a segmentor", ("segment",)
    if isinstance(model, CascadeMaskRCNN):
        return "a detector", ("detect",)
    if isinstance(model, FeatureMaps) or getattr(model, "num_classes", 0) < 1:
        return "a backbone without a head", ("fit",)
    if isinstance(model, FastChannelVim):
        return "a channel model", ("predict", "channels")
    return "a classifier", ("predict",)


@dataclass(frozen=True)
class ImageWork:
    """What the works on images have in common.

    Args:
        model: the choice of the model.
        value_range: the values that become black and white; None for those of the training.
        max_pixels: of an image; None for the usual limit.
    """

    model: ModelChoice
    value_range: tuple[float, float] | None = None
    max_pixels: int | None = None


class OpenedModel:
    """A model on a device, for the works on images.

    Args:
        command: that the model is for.
        work: its choices.
        device: of the model.
        required: keys of the metadata.

    Attributes:
        metadata: of the weights.
        read_picture: opens a picture as the training did.
    """

    batch_size = 1
    endings: Collection[str] | None = None
    read: Read

    def __init__(
        self,
        command: str,
        work: ImageWork,
        device: torch.device,
        required: Collection[str] = (),
    ) -> None:
        model, self.metadata = load_for(command, work.model, required)
        self.weights = digest(model)
        self.device = device
        self.model = model.to(device).eval()
        self.read_picture: PictureReader = picture_reader(
            self.metadata, work.value_range, work.max_pixels
        )
        self._seen = Seen()

    def prepare(self, images: Any) -> tuple[Any, dict[int, UserError]]:
        """As of `Opened`."""
        return images, {}

    def common_settings(self) -> dict[str, Any]:
        """What changes rows of any work."""
        metadata = self.metadata
        return {
            "model": metadata.get("model"),
            "model options": metadata.get("model_args"),
            "value range": self.read_picture.value_range,
            "largest number of pixels": self.read_picture.max_pixels,
        }

    def items(self, found: Iterable[Item]) -> Iterator[Item]:
        """As of `Opened`."""
        return iter(found)

    def hear(self, told: Seen) -> None:
        """As of `Opened`."""
        self._seen.add(told)

    def pass_on(self) -> Seen:
        """As of `Opened`."""
        seen, self._seen = self._seen, Seen()
        return seen

    @property
    def remarks(self) -> list[str]:
        """As of `Opened`."""
        return self._seen.remarks


def digest(model: nn.Module) -> str:
    """SHA-256 of a model's tensors, their names, types and shapes."""
    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()
