"""FastMaskVim: the encoder of a masked autoencoder, over the patches that are kept.

B  batch, d  model width, H W  token grid, n  cells kept
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from fastvim.layers import resize_grid, same_grid, sincos_grid
from fastvim.models.vision import FastVim
from fastvim.models.walks import walk_over
from fastvim.ops.traversal import Mirror

# Nodes of their own in graphs that `torch.fx` traces: they look at sizes.
fx.wrap("fixed_or_stored")
fx.wrap("walk_over")


class FastMaskVim(FastVim):
    """The encoder: a FastVim or Vim without a head, whose position embeddings are fixed.

    Its weights have the names and shapes of a FastVim's, and go into one as they are. An image of
    another size than `img_size` gets the sin-cos embeddings of its own grid.

    Args:
        img_size, patch_size, in_chans, embed_dim: as `FastVim`'s.
        **options: the rest of `FastVim`'s.

    Raises:
        UserError: see `FastVim`; a width that is not a multiple of 4.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 192,
        **options: Any,
    ) -> None:
        super().__init__(
            img_size,
            patch_size,
            in_chans=in_chans,
            embed_dim=embed_dim,
            num_classes=0,
            global_pool="",
            **options,
        )

    def _init_embeddings(self) -> None:
        """As `FastVim`'s, but for the patches and the fixed position embedding.

        The patches' weight is Xavier uniform as a matrix, their bias as PyTorch's.
        """
        super()._init_embeddings()
        self.patch_embed.proj.reset_parameters()
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.detach().flatten(1))
        cells = self.grid_size[0] * self.grid_size[1]
        middle = cells // 2 if self.cls_token is not None else None
        positions = fixed_positions(self.grid_size, self.embed_dim, class_at=middle)
        self.pos_embed.requires_grad_(False).copy_(positions)

    def _cell_positions(self, grid: tuple[int, int]) -> Tensor:
        # The stored ones may be those of a trained model.
        return fixed_or_stored(super()._cell_positions(self.grid_size), self.grid_size, grid)

    def forward_features(
        self, x: Tensor, ids_keep: Tensor | None = None, mirror: Mirror = "published"
    ) -> Tensor:
        """Images to tokens after the last norm; of a masked image, to the kept tokens.

        Args:
            x: (B, in_chans, H, W).
            ids_keep: (B, n) int64, the cells that the blocks see, as row-major indices of the grid
                in ascending order. None: all of them.
            mirror: how the backward direction finds its segments under a mask (`ops.Traversal`).

        Returns:
            (B, n, d); with a class token n + 1, the token in the middle.
        """
        if ids_keep is None:
            return super().forward_features(x)
        tokens, grid = self._embed(x)
        tokens = tokens.gather(1, ids_keep[:, :, None].expand(-1, -1, tokens.shape[2]))
        tokens = self._begin(tokens)
        if self.cls_token is not None:
            return self._encode(tokens, self._walks(tokens.shape[1], grid))
        sizes = {"h": grid[0], "w": grid[1]}
        walks = [walk_over(traversal, sizes, ids_keep, mirror) for traversal in self.traversals]
        return self._encode(tokens, walks)


def fixed_positions(grid: tuple[int, int], dim: int, class_at: int | None) -> Tensor:
    """Sin-cos positions of a grid, and zeros for a class token at that index of the sequence."""
    positions = sincos_grid(grid, dim)
    if class_at is not None:
        before, after = positions.tensor_split([class_at], dim=1)
        positions = torch.cat([before, positions.new_zeros(1, 1, dim), after], dim=1)
    return positions


def fixed_or_stored(stored: Tensor, grid: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Position embeddings (1, H·W, d) of a grid: the stored ones, or sin-cos ones of another."""
    if same_grid(grid, new):
        return stored
    positions = sincos_grid(new, stored.shape[2], stored.device, stored.dtype)
    if not torch.compiler.is_compiling():
        return positions
    # A graph of every size chooses when it runs. Resizing to the same grid changes nothing.
    height, width = (torch.scalar_tensor(side, device=stored.device) for side in new)
    stays = (height == grid[0]) & (width == grid[1])
    return torch.where(stays, resize_grid(stored, grid, new), positions)
