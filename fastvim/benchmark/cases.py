"""What is measured: models by name, image sizes, precisions, and ways of running.

B  batch, H W  image
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import timm
import torch
from torch import Tensor, nn

from fastvim.errors import UserError, nearest
from fastvim.models import FastVim

Size = tuple[int, int]

# "graph" replays one captured CUDA graph, in training of a forward and backward pass.
# "compiled-graph" captures what torch.compile made.
MODES = ("eager", "compiled", "graph", "compiled-graph")


@dataclass(frozen=True)
class Precision:
    """Dtypes of a run, and the largest error that they allow.

    Attributes:
        weights: dtype of weights and images.
        autocast: dtype of the autocast region around the model, or None.
        bound: on the relative error ‖a - b‖ / ‖b‖ of logits, and of gradients.
    """

    weights: torch.dtype
    autocast: torch.dtype | None
    bound: float

    @property
    def products(self) -> torch.dtype:
        """The dtype in which matrix products run."""
        return self.weights if self.autocast is None else self.autocast


PRECISIONS = {
    "float32": Precision(torch.float32, None, 1e-3),
    "float16": Precision(torch.float16, None, 1e-2),
    "bfloat16": Precision(torch.bfloat16, None, 3e-2),
    "amp": Precision(torch.float32, torch.bfloat16, 3e-2),
}


@dataclass(frozen=True)
class Case:
    """One row to measure.

    Attributes:
        model: name, of this library or of timm.
        size: (height, width) of the images.
        batch: images at a time.
        mode: one of `MODES`.
    """

    model: str
    size: Size
    batch: int
    mode: str


@dataclass(frozen=True)
class Settings:
    """What all cases of a run share.

    Attributes:
        device: where to measure.
        dtype: one of `PRECISIONS`.
        train: time training instead of inference: the bare step and the loop of `fastvim fit`.
        channels_last: memory format of weights and images.
        warmup: untimed calls before the timed ones.
        repeats: timed groups of calls; the median is reported.
        check: compare results before timing.
        roofline: measure the roofline (inference of this library's models on CUDA).
    """

    device: torch.device
    dtype: str = "float32"
    train: bool = False
    channels_last: bool = False
    warmup: int = 10
    repeats: int = 10
    check: bool = True
    roofline: bool = True

    @property
    def precision(self) -> Precision:
        """The dtypes of `dtype`."""
        return PRECISIONS[self.dtype]

    @property
    def memory_format(self) -> torch.memory_format:
        """Of weights and images."""
        return torch.channels_last if self.channels_last else torch.contiguous_format


def parse_size(text: str) -> Size:
    """(height, width) of "224" or "224x320".

    Raises:
        UserError: anything else.
    """
    match = re.fullmatch(r"([1-9]\d*)(?:x([1-9]\d*))?", text)
    if match is None:
        raise UserError(f"size {text!r}: expected a number of pixels, or HEIGHTxWIDTH")
    height = int(match[1])
    return height, int(match[2] or height)


def size_name(size: Size) -> str:
    """The inverse of `parse_size`."""
    return str(size[0]) if size[0] == size[1] else f"{size[0]}x{size[1]}"


def check_names(names: Iterable[str]) -> None:
    """Raise UserError at the first name that timm does not know, with the nearest known name."""
    for name in names:
        if "." in name:
            raise UserError(f"{name}: weights are random here; expected the name without its tag")
        if not timm.is_model(name):
            raise UserError(f"no model {name!r}{nearest(name, timm.list_models())}")


def create(name: str, size: Size) -> nn.Module:
    """A randomly initialised model for images of `size`, on the CPU in float32.

    Models whose weights depend on the image size take it as `img_size`. Others (most convolutional
    models) have no such option.
    """
    img_size = size[0] if size[0] == size[1] else size
    try:
        model = timm.create_model(name, img_size=img_size)
    except TypeError as error:
        if "'img_size'" not in str(error):
            raise
        model = timm.create_model(name)
    # A weight of zeros, such as the head of some models, would hide every error before it.
    for parameter in model.parameters():
        if parameter.ndim > 1 and not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return model


def is_ours(model: nn.Module) -> bool:
    """Whether it is a model of this library, with reference operations to compare with."""
    return isinstance(model, FastVim)


def channels_of(model: nn.Module) -> int:
    """Channels of a model's images."""
    cfg = getattr(model, "pretrained_cfg", None) or {}
    return int(cfg.get("input_size", (3,))[0])


def random_images(shape: Sequence[int], settings: Settings) -> Tensor:
    """Normal noise (B, C, H, W) on the device, in the dtype and memory format of the run."""
    images = torch.randn(*shape, device=settings.device)
    return images.to(settings.precision.weights, memory_format=settings.memory_format)
