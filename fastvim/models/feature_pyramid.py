"""Maps at strides 4 to 32 from a backbone of one stride: timm's `features_only`.

B  batch, d  model width, H W  pixels of the image
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.models import FeatureInfo
from torch import Tensor, nn

from fastvim.errors import UserError
from fastvim.layers import same_grid
from fastvim.models.masked import encoder_of

STRIDES = (4, 8, 16, 32)


class FeaturePyramid(nn.Module):
    """Four maps of a backbone, each of another depth and stride, as decoders for CNNs want them.

    Level k is the residual stream after k + 1 quarters of the blocks, through the last norm,
    resized bilinearly to stride 4 · 2^k. There are no weights but the backbone's, trained or
    published. `models.heads.pyramid` has the pyramid with weights of its own.

    Args:
        model: a FastVim, or a masked autoencoder, whose encoder is taken. Its head and the blocks
            after the last level are removed.
        out_indices: levels, 0 to 3, or the last n of them for an int.
        output_stride: the largest stride; coarser levels get it too.

    Raises:
        UserError: another level or stride.
    """

    def __init__(
        self,
        model: nn.Module,
        out_indices: int | Sequence[int] = (0, 1, 2, 3),
        output_stride: int = STRIDES[-1],
    ) -> None:
        super().__init__()
        count = len(STRIDES)
        if isinstance(out_indices, int):
            out_indices = range(-out_indices, 0)
        if not out_indices or any(not -count <= level < count for level in out_indices):
            raise UserError(
                f"out_indices={tuple(out_indices)}: the pyramid has levels 0 to {count - 1}; "
                "feature_cls='getter' gives blocks by their numbers"
            )
        if output_stride not in STRIDES:
            raise UserError(f"output_stride={output_stride}: expected one of {STRIDES}")
        self.model = encoder_of(model)
        depth = len(self.model.blocks)
        blocks = [-(-depth * (level + 1) // count) - 1 for level in range(count)]
        self.levels = [level % count for level in out_indices]
        self.blocks = [blocks[level] for level in self.levels]
        self.strides = [min(stride, output_stride) for stride in STRIDES]
        self.feature_info = FeatureInfo(
            [
                {"module": f"blocks.{block}", "num_chs": self.model.embed_dim, "reduction": stride}
                for block, stride in zip(blocks, self.strides, strict=True)
            ],
            tuple(self.levels),
        )
        self.model.prune_intermediate_layers(self.blocks)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        self.model.set_grad_checkpointing(enable)

    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, C, H, W) to one (B, d, H / stride, W / stride) map a level, sides rounded up."""
        taken = sorted(set(self.blocks))
        maps = self.model.forward_intermediates(x, taken, norm=True, intermediates_only=True)
        of_block = dict(zip(taken, maps, strict=True))
        return [
            self._resize(of_block[block].to(x.dtype), self.strides[level], x)
            for level, block in zip(self.levels, self.blocks, strict=True)
        ]

    def _resize(self, cells: Tensor, stride: int, image: Tensor) -> Tensor:
        """A map of patches to a map of another stride, without what lies beyond the image."""
        step, patch = self.model.patch_embed.stride, self.model.patch_embed.patch_size
        if (step, patch) != (stride, stride):
            covered = [(count - 1) * step + patch for count in cells.shape[-2:]]
            size = [-(-side // stride) for side in covered]
            cells = F.interpolate(cells, size=size, mode="bilinear", align_corners=False)
        height, width = (-(-side // stride) for side in image.shape[-2:])
        if same_grid((height, width), (cells.shape[2], cells.shape[3])):
            return cells
        # By indices: a slice would tie a compiled graph to the sizes that it was traced with.
        rows, columns = (torch.arange(side, device=cells.device) for side in (height, width))
        return cells.index_select(2, rows).index_select(3, columns)
