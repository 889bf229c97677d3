"""What is exported of each kind of model: a module of tensors, its inputs, its free sizes.

B  batch, C  channels that a model knows, c  channels of an image, H W  its pixels, n  cells kept
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule

from fastvim.errors import UserError
from fastvim.models import FastChannelVim, FastVim, FeatureMaps, MaskedAutoencoder, UPerNet
from fastvim.models.masked import encoder_of
from fastvim.ops import use_engine


class Sizes(NamedTuple):
    """Batch, height and width of the images."""

    batch: int
    height: int
    width: int


@dataclass(frozen=True)
class Program:
    """A model as an exporter sees it.

    Attributes:
        task: what it is, for the metadata.
        module: from the inputs to a tensor, or to a tuple of them.
        inputs: names of the inputs, the images first.
        outputs: names of the outputs.
        patch: side of a patch, in pixels.
        make: inputs for images of these sizes, from a generator; the number varies what else may.
        free: axes of each input that a file may leave open.
    """

    task: str
    module: nn.Module
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    patch: int
    make: Callable[[Sizes, torch.Generator, int], tuple[Tensor, ...]]
    free: tuple[tuple[int, ...], ...]

    def traced(self) -> Sizes:
        """Of the images that the program is traced with."""
        return Sizes(2, 5 * self.patch, 7 * self.patch)

    def others(self) -> list[Sizes]:
        """Sizes that it is not traced with: neither square nor whole patches, and other batches."""
        p = self.patch
        return [
            Sizes(1, 3 * p + 2, 6 * p + 5),
            Sizes(3, 9 * p + 1, 4 * p),
            Sizes(2, 8 * p, 2 * p + 3),
        ]

    def trace(self, engine: str, fixed: Sizes | None) -> ExportedProgram:
        """The program with all sizes free, or for images of fixed sizes.

        Args:
            engine: that serves the scan (`fastvim.ops.recurrence`), or "reference" to unroll it.
            fixed: batch, height and width; None leaves them free.
        """
        inputs = self.make(fixed or self.traced(), torch.Generator().manual_seed(0), 0)
        free = tuple(dict.fromkeys(axes, Dim.AUTO) for axes in self.free)
        with use_engine(engine), torch.no_grad():
            traced = torch.export.export(
                self.module, inputs, dynamic_shapes=None if fixed else free, strict=False
            )
        return _without_places(traced)


def _without_places(traced: ExportedProgram) -> ExportedProgram:
    """The program without paths and lines of the Python that it was traced from."""
    for graph in traced.graph_module.modules():
        for node in graph.graph.nodes if isinstance(graph, GraphModule) else ():
            for name in ("stack_trace", "nn_module_stack", "source_fn_stack", "from_node"):
                node.meta.pop(name, None)
    return traced


def program_of(model: nn.Module) -> Program:
    """What is exported of a model.

    Raises:
        UserError: no model of this library, a detector, or one that is a program already.
    """
    backbone = backbone_of(model)
    if "exported" in dict(model.named_buffers(recurse=False)):
        raise UserError("a file of fastvim export holds no model: expected weights")
    model = copy.deepcopy(model).cpu().float().eval().requires_grad_(False)
    if isinstance(model, MaskedAutoencoder):
        return _masked(model)
    if isinstance(model, FastChannelVim):
        return _channels(model)
    if isinstance(model, UPerNet):
        return _plain("segmentor", _Segmentor(_portable(model)), backbone, ("logits",))
    if isinstance(model, FeatureMaps):
        names = tuple(f"map_{block}" for block in model.out_indices)
        return _plain("backbone", model, backbone, names)
    if backbone.num_classes > 0:
        return _plain("classifier", model, backbone, ("logits",))
    return _plain("backbone", model, backbone, ("features",))


def backbone_of(model: nn.Module) -> FastVim:
    """The FastVim or Vim in a model that can be exported."""
    if isinstance(model, UPerNet | FeatureMaps):
        return (model.maps if isinstance(model, UPerNet) else model).backbone
    if isinstance(model, FastVim | MaskedAutoencoder):
        return encoder_of(model)
    if hasattr(model, "rpn"):
        raise UserError(
            "a detector is not exported: which regions it looks at is decided outside of tensors; "
            "its backbone can be (fastvim convert --backbone)"
        )
    raise UserError(f"{type(model).__name__} is no model of this library: it is not exported here")


def _images(backbone: FastVim, sizes: Sizes, generator: torch.Generator, channels: int) -> Tensor:
    return torch.randn(sizes.batch, channels, sizes.height, sizes.width, generator=generator)


def _plain(task: str, module: nn.Module, backbone: FastVim, outputs: tuple[str, ...]) -> Program:
    def make(sizes: Sizes, generator: torch.Generator, number: int) -> tuple[Tensor, ...]:
        return (_images(backbone, sizes, generator, backbone.in_chans),)

    patch = backbone.patch_embed.patch_size
    return Program(task, module, ("images",), outputs, patch, make, ((0, 2, 3),))


def _channels(model: FastChannelVim) -> Program:
    """The channels' numbers are a second input, so that any subset can be given."""

    def make(sizes: Sizes, generator: torch.Generator, number: int) -> tuple[Tensor, ...]:
        most = model.in_chans
        count = max(1, most - number % most) if number else min(3, most)
        chosen = torch.randperm(most, generator=generator)[:count]
        return _images(model, sizes, generator, count), chosen

    of_channels = (0,) if model.in_chans > 2 else ()
    free = ((0, *(1 for _ in of_channels), 2, 3), of_channels)
    patch = model.patch_embed.patch_size
    inputs = ("images", "channels")
    return Program("channel model", model, inputs, ("logits",), patch, make, free)


class _WholeAutoencoder(nn.Module):
    """Images and the cells to keep, to the pixels of all patches and the encoder's tokens."""

    def __init__(self, model: MaskedAutoencoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, ids_keep: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, H, W) and (B, n), ascending, to (B, L, p·p·C) and (B, n, d)."""
        grid = self.model.encoder.patch_embed.grid_size(*images.shape[-2:])
        latent = self.model.forward_encoder(images, ids_keep)
        return self.model.forward_decoder(latent, ids_keep, grid), latent


def _masked(model: MaskedAutoencoder) -> Program:
    def make(sizes: Sizes, generator: torch.Generator, number: int) -> tuple[Tensor, ...]:
        images = _images(model.encoder, sizes, generator, model.encoder.in_chans)
        down, across = model.encoder.patch_embed.grid_size(sizes.height, sizes.width)
        ratio = model.mask_ratio / (1 + number)
        kept = model.random_mask(sizes.batch, down * across, mask_ratio=ratio, generator=generator)
        return images, kept

    patch = model.encoder.patch_embed.patch_size
    whole = _WholeAutoencoder(model)
    inputs, outputs = ("images", "ids_keep"), ("prediction", "latent")
    return Program("masked autoencoder", whole, inputs, outputs, patch, make, ((0, 2, 3), (0, 1)))


class _Segmentor(nn.Module):
    """A `UPerNet` whose logits are cut by padding: a slice would tie a program to whole patches."""

    def __init__(self, model: UPerNet) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """As `UPerNet`'s in evaluation."""
        logits = self.model.head(self.model.maps(images))
        stride = self.model.maps.backbone.patch_embed.stride
        sides = list(zip(logits.shape[-2:], images.shape[-2:], strict=True))
        covered = [max(cells * stride, pixels) for cells, pixels in sides]
        whole = F.interpolate(logits, size=covered, mode="bilinear", align_corners=False)
        bottom, right = (pixels - all for (_, pixels), all in zip(sides, covered, strict=True))
        return F.pad(whole, (0, right, 0, bottom))


def _portable(model: UPerNet) -> UPerNet:
    """Replace the layers that ONNX has for fixed sizes alone."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.AdaptiveAvgPool2d):
                setattr(module, name, _AveragePool(int(child.output_size)))  # type: ignore[arg-type]
    return model


class _AveragePool(nn.Module):
    """`nn.AdaptiveAvgPool2d` as two matrix products, for maps of any size."""

    def __init__(self, cells: int) -> None:
        super().__init__()
        self.cells = cells

    def forward(self, x: Tensor) -> Tensor:
        """(B, d, H, W) to (B, d, cells, cells)."""
        down, across = (self._weights(x, axis) for axis in (-2, -1))
        return down @ x @ across.mT

    def _weights(self, x: Tensor, axis: int) -> Tensor:
        """(cells, size): cell i averages places ⌊i · size / cells⌋ to ⌈(i + 1) · size / cells⌉."""
        size = x.shape[axis]
        i = torch.arange(self.cells, device=x.device)[:, None]
        place = torch.arange(size, device=x.device)[None]
        first, end = i * size // self.cells, ((i + 1) * size + self.cells - 1) // self.cells
        inside = ((place >= first) & (place < end)).to(x.dtype)
        return inside / inside.sum(1, keepdim=True)
