"""FastChannelVim and ChannelVim: each channel of an image is cut into tokens of its own.

B  batch, C  channels that the model knows, c  channels of an image, H W  token grid,
L  tokens, c·H·W (and the class token, where there is one), d  model width
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import trunc_normal_
from torch import Tensor, fx, nn

from fastvim.errors import UserError
from fastvim.layers import ChannelPatchEmbed
from fastvim.models.parts import on_device
from fastvim.models.vision import FastVim
from fastvim.models.walks import grid_traversals, walk_over
from fastvim.ops import Segments, Traversal
from fastvim.options import Range, check, check_choice

fx.wrap("walk_over")

TOKEN_ORDERS = ("channel_first", "spatial_first")

# (path, pooled axes) of the layers in turn, for each order and number of pooled axes.
_WALKS = {
    ("channel_first", 1): (("h w c", "w"), ("w h c", "h")),
    ("spatial_first", 1): (("c h w", "w"), ("c w h", "h")),
    ("channel_first", 2): (("h w c", "w c"), ("w h c", "h c"), ("h w c", "h w")),
}


def channel_traversals(
    token_order: str,
    pooled_axes: int,
    pooling: str,
    scan_path: str,
    alternate: bool,
    class_token: bool,
) -> tuple[Traversal, ...]:
    """The walks that the layers of a `FastChannelVim` take in turn; see there for the options.

    Raises:
        UserError: an option outside its choices, or two that contradict each other.
    """
    check_choice(TOKEN_ORDERS, token_order=token_order)
    check(Range(1, 2, whole=True), pooled_axes=pooled_axes)
    if class_token:
        if token_order != "channel_first":
            raise UserError("class_token=True needs token_order='channel_first'")
        return grid_traversals(pooling, scan_path, alternate, class_token)
    plain = scan_path == "row" and alternate
    if pooled_axes == 2 and (token_order != "channel_first" or not plain):
        raise UserError(
            "pooled_axes=2 needs token_order='channel_first', scan_path='row' and alternate=True"
        )
    walks = list(_WALKS[token_order, pooled_axes])
    if scan_path == "column":
        walks.reverse()
    if pooling == "none":
        return (Traversal(walks[0][0]),)
    return tuple(Traversal(path, pool) for path, pool in (walks if alternate else walks[:1]))


class FastChannelVim(FastVim):
    """FastVim over the channels of an image as well as its rows and columns (arXiv 2502.00594), and
    ChannelVim as the case that pools nothing.

    All channels share the patch projection and the position embedding; a learned vector tells them
    apart. Takes images (B, c, H, W) of any height and width from one patch up. Their channels are
    the first c that the model knows, or those named in the call. Tokens lie cell by cell, the
    channels of a cell together.

    Args:
        img_size: side, or (height, width), that the position embedding is stored for.
        patch_size: side of a patch, in pixels.
        in_chans: channels that the model knows, C.
        token_order: "channel_first" walks the channels of a cell one after the other,
            "spatial_first" the cells of a channel.
        pooled_axes: 1: rows and columns in turn. 2: rows with channels, columns with channels, and
            the whole image of each channel in turn ("channel_first" alone).
        pooling: "mean" or "max"; "none" is ChannelVim.
        scan_path, alternate, class_token: as `FastVim`'s. The class token has no position.
        **options: the rest of `FastVim`'s, but for `patch_stride`.

    Raises:
        UserError: an option outside its choices, or two that contradict each other.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 8,
        *,
        token_order: str = "channel_first",
        pooled_axes: int = 1,
        pooling: str = "mean",
        scan_path: str = "row",
        alternate: bool = True,
        class_token: bool = False,
        **options: Any,
    ) -> None:
        if options.get("patch_stride") not in (None, patch_size):
            raise UserError(f"patch_stride={options['patch_stride']}: expected the patch_size")
        super().__init__(
            img_size,
            patch_size,
            in_chans=in_chans,
            pooling=pooling,
            scan_path=scan_path,
            alternate=alternate,
            class_token=class_token,
            traversals=channel_traversals(
                token_order, pooled_axes, pooling, scan_path, alternate, class_token
            ),
            **options,
        )
        self.token_order = token_order
        # Drawn after all of a FastVim's weights: the order decides which weights a seed gives.
        with on_device(options.get("device")):
            self.patch_embed = ChannelPatchEmbed(in_chans, self.embed_dim, patch_size)
            cells = self.grid_size[0] * self.grid_size[1]
            self.pos_embed = nn.Parameter(torch.empty(1, cells, self.embed_dim))
            trunc_normal_(self.pos_embed, std=0.02)
        if options.get("dtype") is not None:
            self.to(options["dtype"])

    @property
    def positions_class(self) -> bool:
        """Never: the class token has no position."""
        return False

    def _embed(
        self, image: Tensor, channels: Sequence[int] | Tensor | None = None
    ) -> tuple[Tensor, tuple[int, int]]:
        """The patches of every channel with their positions, (B, H·W·c, d), and their grid."""
        tokens, grid = self.patch_embed(image, channels), self._grid(image)
        return (tokens + self._cell_positions(grid)[:, :, None]).flatten(1, 2), grid

    def _walks(self, num_tokens: int, grid: tuple[int, int]) -> list[Segments]:
        if self.cls_token is not None:
            return super()._walks(num_tokens, grid)
        sizes = {"h": grid[0], "w": grid[1], "c": num_tokens // (grid[0] * grid[1])}
        return [walk_over(traversal, sizes) for traversal in self.traversals]

    def forward_features(self, x: Tensor, channels: Sequence[int] | Tensor | None = None) -> Tensor:
        """Images to tokens after the last norm.

        Args:
            x: (B, c, H, W).
            channels: which of the C channels the image holds, in its order: c different numbers,
                or an int64 tensor (c,) of them, which is not checked. None: the first c.

        Returns:
            (B, L, d): cell by cell, the channels of a cell together.
        """
        tokens, grid = self._embed(x, channels)
        tokens = self._begin(tokens)
        return self._encode(tokens, self._walks(tokens.shape[1], grid))

    def forward(self, x: Tensor, channels: Sequence[int] | Tensor | None = None) -> Tensor:
        """(B, c, H, W) images to logits (B, num_classes); see `forward_features`."""
        return self.forward_head(self.forward_features(x, channels))

    def _format(
        self, x: Tensor, grid: tuple[int, int], output_fmt: str, with_prefix: bool
    ) -> Tensor | tuple[Tensor, Tensor]:
        """As `FastVim`'s; maps are means over the channels."""
        tokens, prefix = super()._format(x, grid, "NLC", with_prefix=True)
        if output_fmt == "NCHW":
            cells = tokens.unflatten(1, (grid[0] * grid[1], -1)).mean(2)
            tokens = cells.mT.unflatten(2, grid).contiguous()
        return (tokens, prefix) if with_prefix else tokens


def sample_channels(
    count: int, generator: torch.Generator | None = None, *, ordered: bool = True
) -> Tensor:
    """Hierarchical channel sampling (ChannelViT, arXiv 2309.16108): how many, then which ones.

    Args:
        count: channels to choose from.
        generator: of the draw; None for torch's own.
        ordered: in ascending order, as published.

    Returns:
        (c,) int64 on the CPU, without repetition; c is uniform in 1..count.
    """
    kept = int(torch.randint(1, count + 1, (), generator=generator))
    chosen = torch.randperm(count, generator=generator)[:kept]
    return chosen.sort().values if ordered else chosen
