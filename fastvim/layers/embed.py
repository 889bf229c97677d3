"""Patch embeddings, and position embeddings of a token grid.

B  batch, H W  image or token grid, C  channels that a model knows, c  channels of an image
L  tokens, d  model width
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.layers import lecun_normal_, trunc_normal_
from timm.models import register_notrace_module
from torch import Tensor, fx, nn
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fastvim.errors import UserError
from fastvim.layers.hooks import is_bypassed

# Nodes of their own in graphs that `torch.fx` traces: they look at sizes.
fx.wrap("channel_index")
fx.wrap("check_channels")
fx.wrap("grid_of")
fx.wrap("whole_patches")
fx.wrap("resize_grid")


@register_notrace_module
class PatchEmbed(nn.Module):
    """Embed patches of images of any size by one convolution.

    Args:
        in_chans: channels of the image.
        embed_dim: model width d.
        patch_size: side of a patch, in pixels.
        stride: pixels between patches. None: `patch_size`. Patches of Vim's fine-tuned models
            overlap.
    """

    def __init__(
        self, in_chans: int, embed_dim: int, patch_size: int, stride: int | None = None
    ) -> None:
        super().__init__()
        self.in_chans = in_chans
        self.patch_size = patch_size
        self.stride = patch_size if stride is None else stride
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=self.stride)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """LeCun normal, bias 0."""
        lecun_normal_(self.proj.weight)
        if self.proj.bias is not None:
            nn.init.zeros_(self.proj.bias)

    def grid_size(self, height: int, width: int) -> tuple[int, int]:
        """Patches down and across an image of `height` by `width` pixels, after padding.

        Raises:
            UserError: the image is smaller than a patch.
        """
        return grid_of(height, width, self.patch_size, self.stride)

    def forward(self, image: Tensor) -> Tensor:
        """(B, C, H, W) image to (B, L, d) tokens, in row-major order of the image's `grid_size`.

        The image is zero-padded at the bottom and right to sides of patch + k · stride pixels.

        Raises:
            UserError: wrong number of channels, or an image smaller than a patch.
        """
        check_channels(image, self.in_chans, self.in_chans)
        height, width = image.shape[-2:]
        grid = self.grid_size(height, width)
        image = whole_patches(image, grid, self.patch_size, self.stride)
        if self.stride != self.patch_size or not is_bypassed(self.proj, nn.Conv2d, image):
            return self.proj(image).flatten(2).mT
        # Without overlap the convolution is a matrix product: several times as fast on GPUs.
        side = self.patch_size
        patches = image.unflatten(3, (grid[1], side)).unflatten(2, (grid[0], side))
        patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)


@register_notrace_module
class ChannelPatchEmbed(PatchEmbed):
    """Embed the patches of each channel by a shared projection, plus a learned channel vector.

    Args:
        in_chans: C, channels that the model knows.
        embed_dim: model width d.
        patch_size: side of a patch, in pixels.
    """

    def __init__(self, in_chans: int, embed_dim: int, patch_size: int) -> None:
        super().__init__(1, embed_dim, patch_size)
        self.known_chans = in_chans
        self.channel_embed = nn.Embedding(in_chans, embed_dim)
        trunc_normal_(self.channel_embed.weight, std=0.02)

    def reset_parameters(self) -> None:
        """The projection as PyTorch's convolutions: uniform in ±1 / patch_size, with its bias.

        Channel vectors truncated normal, 0.02.
        """
        self.proj.reset_parameters()
        if hasattr(self, "channel_embed"):  # not yet when the base class is built
            trunc_normal_(self.channel_embed.weight, std=0.02)

    def forward(self, image: Tensor, channels: Sequence[int] | Tensor | None = None) -> Tensor:
        """(B, c, H, W) image to tokens (B, L, c, d), cells in row-major order.

        Args:
            image: c channels, at most C.
            channels: index of each image channel among the known ones: c numbers below C, or an
                int64 tensor (c,), which is not checked. None: the first c.

        Raises:
            UserError: more channels than C, an unknown or repeated index, or an image smaller than
                a patch.
        """
        check_channels(image, 1, self.known_chans)
        count = image.shape[1]
        if channels is None and is_bypassed(self.channel_embed, nn.Embedding, image):
            vectors = self.channel_embed.weight[:count]
        else:
            device = self.channel_embed.weight.device
            vectors = self.channel_embed(channel_index(channels, count, self.known_chans, device))
        cells = super().forward(image.flatten(0, 1)[:, None])
        return cells.unflatten(0, (-1, count)).transpose(1, 2) + vectors


def channel_index(
    channels: Sequence[int] | Tensor | None, count: int, known: int, device: torch.device
) -> Tensor:
    """(c,) int64, what `ChannelPatchEmbed` is told of an image's channels."""
    if channels is None:
        return torch.arange(count, device=device)
    if isinstance(channels, Tensor):
        return channels.to(device)
    valid = len(set(channels)) == len(channels) and all(
        0 <= channel < known for channel in channels
    )
    if len(channels) != count or not valid:
        raise UserError(
            f"channels={list(channels)} of an image with {count}: expected as many different "
            f"numbers from 0 to {known - 1}"
        )
    return torch.tensor(channels, device=device)


def check_channels(image: Tensor, least: int, most: int) -> None:
    """Raise UserError for what is no batch of images with that many channels."""
    if image.ndim != 4 or not least <= image.shape[1] <= most:
        count = f"{least}" if least == most else f"{least} to {most} channels"
        raise UserError(f"image {tuple(image.shape)}: expected (batch, {count}, height, width)")


def grid_of(height: int, width: int, patch_size: int, stride: int) -> tuple[int, int]:
    """`PatchEmbed.grid_size`."""
    if height < patch_size or width < patch_size:
        raise UserError(
            f"image of {height} x {width} pixels: smaller than a patch, {patch_size} x {patch_size}"
        )
    down, across = (-(-(side - patch_size) // stride) for side in (height, width))
    return down + 1, across + 1


def whole_patches(image: Tensor, grid: tuple[int, int], patch_size: int, stride: int) -> Tensor:
    """Zero-pad an image at the bottom and right to all pixels of a grid of patches."""
    bottom, right = (
        patch_size + (count - 1) * stride - side
        for count, side in zip(grid, image.shape[-2:], strict=True)
    )
    if same_grid((bottom, right), (0, 0)):
        return image
    return F.pad(image, (0, right, 0, bottom))


def same_grid(old: tuple[int, int], new: tuple[int, int]) -> bool:
    """Whether two grids have the same sizes.

    False where the sizes are symbols of a compiler, so that its graph serves every size. What it
    does for another grid has to give the same for this one.
    """
    if torch.jit.is_tracing():  # sizes are tensors, and a trace holds one of them
        return old == new
    return all(statically_known_true(a == b) for a, b in zip(old, new, strict=True))


def resize_grid(embedding: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Resize a position embedding (1, H·W, d) bicubically from one grid to another."""
    if same_grid(old, new):
        return embedding
    grid = embedding.mT.unflatten(2, old).float()
    # Before torch 2.14 dynamo takes `torch.compile` for an export too. Its graphs have no products
    # here: autocast would round them, and inductor set guards on their sizes.
    if torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling():
        down, across = (_cubic(*sizes, grid.device) for sizes in zip(old, new, strict=True))
        rows = torch.mm(grid.flatten(0, 2), across.mT).unflatten(0, (-1, old[0]))
        resized = torch.bmm(down.expand(rows.shape[0], -1, -1), rows)[None]
    else:
        resized = F.interpolate(grid, size=new, mode="bicubic", align_corners=False)
    return resized.flatten(2).mT.to(embedding.dtype)


def _cubic(old: int, new: int, device: torch.device) -> Tensor:
    """The weights (new, old) of `F.interpolate`'s bicubic mode along one axis.

    For exported programs: not every reader of ONNX has the mode (TensorRT lacks it).
    """
    a = -0.75
    place = (torch.arange(new, device=device)[:, None] + 0.5) * old / new - 0.5
    taps = place.floor() + torch.arange(-1, 3, device=device)
    x = (place - taps).abs()
    near, far = ((a + 2) * x - (a + 3)) * x * x + 1, ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    at = taps.clamp(0, old - 1)[:, :, None] == torch.arange(old, device=device)
    return (torch.where(x <= 1, near, far)[:, :, None] * at).sum(1)


def sincos_grid(
    grid: tuple[int, int],
    dim: int,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Fixed position embedding of a grid, (1, H·W, dim) (Masked Autoencoders, arXiv 2111.06377).

    Four quarters of the width: sine and cosine of the column, sine and cosine of the row.
    Frequencies fall from 1 towards 1e-4.

    Raises:
        UserError: a width that is not a multiple of 4.
    """
    if dim % 4:
        raise UserError(f"width {dim}: sin-cos position embeddings need a multiple of 4")
    height, width = grid
    frequencies = 1e-4 ** (torch.arange(dim // 4, device=device) / (dim // 4))
    rows, columns = (torch.arange(side, device=device) for side in grid)
    down = (rows[:, None] * frequencies)[:, None].expand(height, width, -1)
    across = (columns[:, None] * frequencies)[None].expand(height, width, -1)
    parts = [across.sin(), across.cos(), down.sin(), down.cos()]
    return torch.cat(parts, dim=-1).flatten(0, 1)[None].to(dtype)
