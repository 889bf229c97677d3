"""The model that a command works with, and what every work with a model has."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from fastvim.data.pixels import PictureReader
from fastvim.errors import UserError
from fastvim.inference.inputs import Arrays, Pictures, Seen, picture_reader
from fastvim.inference.parts.work import Item
from fastvim.models import (
    CascadeMaskRCNN,
    FastChannelVim,
    FeatureMaps,
    MaskedAutoencoder,
    UPerNet,
)
from fastvim.weights import is_file_name, load_model


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
    name, file = choice.name, choice.file
    if name is not None and is_file_name(name):
        name, file = None, name
    try:
        model, metadata = load_model(name, file, ema=choice.ema, **choice.options)
    except TypeError as error:
        if not choice.options:
            raise
        given = " ".join(f"{name}={json.dumps(value)}" for name, value in choice.options.items())
        raise UserError(f"--model-arg {given}: a value of another type ({error})") from error
    source = file or name
    kind, commands = _kind(model)
    if command not in commands:
        raise UserError(f"{source} is {kind}: see fastvim {commands[0]}")
    if missing := [key for key in required if key not in metadata]:
        raise UserError(f"{source} does not say {missing[0]}: expected weights of fastvim fit")
    return model, metadata


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
    read: Pictures | Arrays

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
