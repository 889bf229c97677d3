"""What a model costs, counted from its sizes: parameters, multiply-adds, activations, memory.

B  batch, L  tokens, d  model width, E  inner width, K  taps of the convolution, N  state size,
R  rank of the step size, S  steps of the scan, s  bytes of an element of the products

Nothing is run, so that any image size costs the same.

Multiply-adds are the multiplications of matrix products and convolutions, by their shapes, and of
the scan as it is computed: for each step, channel and state the decay's exponent, the state's
decay, its input and its output, and for each step and channel the step size's product with the
input. Exponentials and what works on single elements (norms, gates, activations, pooling, skips,
the resizing of positions) are left out.

Activations are the elements that products, convolutions and the four operations write.

Memory is that of tensors on a GPU, where the kernels serve all four operations; that of CUDA itself
and of its libraries comes on top.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

import torch
from torch import nn

from fastvim.benchmark.cases import PRECISIONS, Precision, Size, size_name
from fastvim.errors import UserError
from fastvim.layers import Block
from fastvim.models import FastChannelVim, FastVim, MaskedAutoencoder, create_model
from fastvim.models.masked import encoder_of
from fastvim.options import SIZE, check
from fastvim.weights.table import ENTRIES

FLOAT = 4  # bytes of an element of the residual stream, in any precision


@dataclass(frozen=True)
class Shape:
    """The sizes of a block on a batch.

    Attributes:
        tokens: B · L.
        steps: B · S, of each direction.
        dim: model width d.
        inner: inner width E.
        taps: K.
        states: N.
        rank: R.
        masked: whether the tokens are those that a mask leaves of a grid.
    """

    tokens: int
    steps: int
    dim: int
    inner: int
    taps: int
    states: int
    rank: int
    masked: bool = False

    @classmethod
    def of(cls, block: nn.Module, tokens: int, steps: int, masked: bool = False) -> Shape:
        """A block on so many tokens and steps of the whole batch."""
        assert isinstance(block, Block)
        mixer = block.mixer
        _, inner, taps = mixer.conv_weight.shape
        dim = mixer.in_proj.in_features
        return cls(tokens, steps, dim, inner, taps, mixer.d_state, mixer.dt_rank, masked)

    @property
    def products(self) -> int:
        """Multiply-adds of matrix products and of the convolution."""
        projections = 3 * self.tokens * self.dim * self.inner  # in_proj, out_proj
        selection = 2 * self.steps * self.inner * (2 * self.rank + 2 * self.states)
        return projections + selection + 2 * self.tokens * self.inner * self.taps

    @property
    def scan(self) -> int:
        """Multiply-adds of the recurrence, in both directions."""
        return 2 * self.steps * self.inner * (4 * self.states + 1)

    @property
    def activations(self) -> int:
        """Elements written."""
        by_tokens = 3 * self.dim + 4 * self.inner  # stream, norm, out; x, z, skip, product
        return self.tokens * by_tokens + 4 * self.steps * self.inner  # pooled, scanned

    def saved(self, element: int) -> int:
        """Bytes kept for the backward pass: the inputs of the operations and of the products.

        Args:
            element: bytes s.
        """
        by_tokens = FLOAT * self.dim + element * (self.dim + 4 * self.inner)
        by_steps = 4 * element * self.inner
        if self.masked:  # x once more, in the order of the path; what is scanned, for each token
            by_tokens += (element + FLOAT) * self.inner
            by_steps = 2 * element * self.inner
        return self.tokens * by_tokens + self.steps * by_steps

    def live(self, element: int, stored: int) -> int:
        """Bytes that are there at once in inference, in the scan or in the product that follows it.

        Two states of the stream, the embedded image, the mixer's input, its norm, x and z, and what
        came of them.

        Args:
            element: bytes s.
            stored: bytes of an element of the weights, and of the embedded image.
        """
        by_tokens = (2 * FLOAT + stored) * self.dim + element * (2 * self.dim + 3 * self.inner)
        by_steps = 4 * element * self.inner  # pooled, scanned
        in_scan = 2 * self.steps * FLOAT * (self.inner + 2 * self.states)  # step sizes, B and C
        after = self.tokens * element * (self.inner + self.dim)  # gated, output
        if self.masked:
            after += self.tokens * FLOAT * self.inner  # what is scanned, for each token
        return self.tokens * by_tokens + self.steps * by_steps + max(in_scan, after)

    def passing(self, element: int) -> int:
        """Bytes of the backward pass beside what was kept for it: gradients of x and z, the scan's.

        Args:
            element: bytes s.
        """
        scan = self.steps * self.inner * (2 * element + 8 * FLOAT)
        return 2 * self.tokens * self.inner * element + scan


@dataclass(frozen=True)
class Linear:
    """A matrix product outside of the blocks.

    Attributes:
        rows: of the input, over the batch.
        inputs: width of a row.
        outputs: width of a row of the result.
        kept: rows of the tensor that the input is a part of.
    """

    rows: int
    inputs: int
    outputs: int
    kept: int

    @property
    def products(self) -> int:
        """Multiply-adds."""
        return self.rows * self.inputs * self.outputs


@dataclass(frozen=True)
class Parts:
    """What a model consists of, on a batch.

    Attributes:
        layers: the blocks.
        linears: the products outside of them, that of the patches first.
        stream: elements of the residual stream at the last norms.
        embedded: elements of an embedded image that a mask chooses from.
        pixels: elements that an autoencoder predicts.
    """

    layers: list[Shape]
    linears: list[Linear]
    stream: int
    embedded: int = 0
    pixels: int = 0


@dataclass(frozen=True)
class Profile:
    """What a model costs at one size and batch.

    Attributes:
        parameters: number of them.
        products: multiply-adds of products and convolutions, of the batch.
        scan: multiply-adds of the scans, of the batch.
        activations: elements written, of the batch.
        inference: bytes of weights, images and what is there at once.
        training: likewise of a step that begins without gradients; the optimiser's state comes on
            top.
    """

    parameters: int
    products: int
    scan: int
    activations: int
    inference: int
    training: int


def profile(
    model: nn.Module, batch: int, size: Size, precision: Precision, channels: int | None = None
) -> Profile:
    """What one of this library's models costs.

    Args:
        model: a FastVim or Vim, channel model or masked autoencoder; on any device, also "meta".
        batch: images at a time.
        size: (height, width) of the images.
        precision: dtypes of weights and products.
        channels: of the images of a channel model; None for all that it knows.

    Raises:
        UserError: another model; an image smaller than a patch; channels of a model that takes no
            choice of them, or more than it knows.
    """
    if not isinstance(model, FastVim | MaskedAutoencoder):
        raise UserError(f"{type(model).__name__}: expected a model of this library")
    in_chans = channels_of(encoder_of(model), channels)
    parts = parts_of(model, batch, size, in_chans)
    layers, linears = parts.layers, parts.linears
    element, stored = precision.products.itemsize, precision.weights.itemsize
    parameters = sum(each.numel() for each in model.parameters())
    images = batch * in_chans * size[0] * size[1] * stored
    held = parameters * stored + images
    saved = sum(layer.saved(element) for layer in layers)
    saved += sum(each.kept * each.inputs for each in linears) * element
    saved += FLOAT * (parts.stream + parts.pixels) + stored * parts.embedded
    if precision.autocast is not None:  # which keeps copies of the matrices for the gradients
        matrices = (each for each in model.modules() if isinstance(each, nn.Linear | nn.Conv2d))
        saved += sum(each.weight.numel() for each in matrices) * element
    in_blocks = max(layer.live(element, stored) for layer in layers)
    embed = linears[0]
    padded = embed.rows * embed.inputs != batch * in_chans * size[0] * size[1]
    copies = stored * (1 + padded) + (0 if precision.autocast is None else element)
    embedding = embed.kept * embed.inputs * copies + embed.rows * embed.outputs * element
    passing = max(layer.passing(element) for layer in layers)
    return Profile(
        parameters=parameters,
        products=sum(layer.products for layer in layers) + sum(each.products for each in linears),
        scan=sum(layer.scan for layer in layers),
        activations=sum(layer.activations for layer in layers)
        + sum(each.rows * each.outputs for each in linears)
        + 2 * parts.stream,
        inference=held + max(embedding, in_blocks, parts.pixels * (3 * FLOAT + element)),
        # What is kept gives way to gradients of the weights, from the last block to the first.
        training=held
        + max(
            saved + max(passing, 4 * FLOAT * parts.pixels),  # blocks, or an autoencoder's loss
            parameters * stored + passing,
        ),
    )


def describe(
    name: str, batch: int, size: Size | None, dtype: str, channels: int | None = None
) -> list[tuple[str, str]]:
    """What a model of this library costs, in words.

    Args:
        name: of the model, with or without a tag.
        batch: images at a time.
        size: (height, width) of the images; None for the model's own.
        dtype: one of `fastvim.benchmark.cases.PRECISIONS`.
        channels: as of `profile`.

    Returns:
        Names of quantities, and their values.

    Raises:
        UserError: no such model, or as `profile`.
    """
    entry = ENTRIES.get(name)
    if entry is not None and entry.head:
        raise UserError(f"{name} is a whole {entry.task} model: expected its backbone's name")
    with torch.device("meta"):
        model = create_model(name)
    if not isinstance(model, FastVim | MaskedAutoencoder):
        raise UserError(f"{name} is no model of this library: see fastvim models")
    backbone = encoder_of(model)
    size = size or image_size(backbone)
    check(SIZE, size=size)
    found = profile(model, batch, size, PRECISIONS[dtype], channels)
    images = f"{size_name(size)} pixels, {channels_of(backbone, channels)} channels"
    if isinstance(model, MaskedAutoencoder):
        images += f", {model.mask_ratio:.0%} masked"
    mean = f"{(found.products + found.scan) / batch / 1e9:.3f} G"
    return [
        ("images", f"{batch} of {images}, {dtype}"),
        ("parameters", f"{found.parameters:,}"),
        ("multiply-adds of an image", f"{mean}, {found.scan / batch / 1e9:.3f} G in the scan"),
        ("activations of an image", f"{found.activations / batch / 1e6:.1f} M"),
        ("memory in inference", _bytes(found.inference)),
        ("memory in a training step", _bytes(found.training)),
        ("and for AdamW", _bytes(2 * PRECISIONS[dtype].weights.itemsize * found.parameters)),
    ]


def _bytes(count: int) -> str:
    return f"{count / 2**20:.0f} MiB" if count < 2**30 else f"{count / 2**30:,.2f} GiB"


def image_size(backbone: FastVim) -> Size:
    """Height and width of the images that the position embedding is made for."""
    patches = backbone.patch_embed
    down, across = ((n - 1) * patches.stride + patches.patch_size for n in backbone.grid_size)
    return down, across


def channels_of(backbone: FastVim, channels: int | None) -> int:
    """Channels of the images: all that the model knows, or the choice, where it takes one."""
    known = backbone.in_chans
    if channels is None:
        return known
    if not isinstance(backbone, FastChannelVim):
        raise UserError(f"channels {channels}: the model takes images of {known} channels alone")
    if not 1 <= channels <= known:
        raise UserError(f"channels {channels}: expected 1 to {known}, which the model knows")
    return channels


def layers_of(
    backbone: FastVim, batch: int, size: Size, channels: int, kept: int | None = None
) -> list[Shape]:
    """The blocks of a model on a batch of images.

    Args:
        backbone: a FastVim or Vim, a channel model, or the encoder of an autoencoder.
        batch: images at a time.
        size: (height, width) of the images.
        channels: of the images.
        kept: cells that a mask leaves of each image; None without a mask.
    """
    grid = backbone.patch_embed.grid_size(*size)
    sizes = {"h": grid[0], "w": grid[1]}
    if isinstance(backbone, FastChannelVim):
        sizes["c"] = channels
    tokens = prod(sizes.values()) if kept is None else kept
    if backbone.cls_token is not None:
        tokens, kept = tokens + 1, None  # one line of tokens, whatever was left out
        sizes = {"l": tokens}
    walks = [walk.over(sizes) for walk in backbone.traversals]
    steps = [walk.num_segments if walk.pools else tokens for walk in walks]
    return [
        Shape.of(block, batch * tokens, batch * steps[i % len(steps)], masked=kept is not None)
        for i, block in enumerate(backbone.blocks)
    ]


def parts_of(model: FastVim | MaskedAutoencoder, batch: int, size: Size, channels: int) -> Parts:
    """What a model consists of, on a batch of images of these channels."""
    backbone = encoder_of(model)
    cells, dim = prod(backbone.patch_embed.grid_size(*size)), backbone.embed_dim
    by_channel = isinstance(backbone, FastChannelVim)
    patches, width = batch * cells * (channels if by_channel else 1), 1 if by_channel else channels
    embed = _linear(patches, width * backbone.patch_embed.patch_size**2, dim)
    if backbone.patch_embed.stride != backbone.patch_embed.patch_size:
        embed = replace(embed, kept=0)  # a convolution, which keeps the images themselves
    if isinstance(model, MaskedAutoencoder):
        kept = model.random_mask(1, cells, device=torch.device("meta")).shape[1]
        layers = layers_of(backbone, batch, size, channels, kept)
        seen, decoded = layers[0].tokens, batch * (cells + int(backbone.cls_token is not None))
        after, head = model.decoder_embed, model.decoder_pred
        linears = [
            embed,
            _linear(seen, dim, after.out_features),
            _linear(decoded, head.in_features, head.out_features),
        ]
        stream = seen * dim + decoded * head.in_features
        decoder = [Shape.of(block, decoded, decoded) for block in model.decoder_blocks]
        pixels = batch * cells * head.out_features
        return Parts([*layers, *decoder], linears, stream, batch * cells * dim, pixels)
    layers, linears = layers_of(backbone, batch, size, channels), [embed]
    tokens = layers[0].tokens
    if model.num_classes > 0:
        whole = model.global_pool in ("", "max_logit")  # the head sees every token
        part = model.global_pool in ("token", "last")
        rows = tokens if whole else batch
        linears.append(Linear(rows, dim, model.num_classes, tokens if part else rows))
    return Parts(layers, linears, tokens * dim)


def _linear(rows: int, inputs: int, outputs: int) -> Linear:
    return Linear(rows, inputs, outputs, rows)
