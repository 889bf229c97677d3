"""Feature maps for dense tasks.

B  batch, d  model width, H W  token grid
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from fastvim.models.intermediates import Source
from fastvim.models.parts import reset_layers
from fastvim.models.vision import FastVim


class FeatureMaps(nn.Module):
    """Maps of several blocks of a backbone, each through its own LayerNorm.

    As published for segmentation and detection: the maps are the outputs of the blocks' mixers,
    before they join the residual stream, all at the stride of the patches; the backbone has no last
    norm and no head.

    Args:
        backbone: its last norm, its head and the blocks after the last index are removed.
        out_indices: blocks to take.
        source: "mixer" as published, or the "residual" stream after the block.
    """

    def __init__(
        self, backbone: FastVim, out_indices: Sequence[int], source: Source = "mixer"
    ) -> None:
        super().__init__()
        self.out_indices = backbone.prune_intermediate_layers(list(out_indices), prune_norm=True)
        self.source: Source = source
        self.backbone = backbone
        self.norms = nn.ModuleList(
            nn.LayerNorm(backbone.embed_dim, eps=1e-5) for _ in self.out_indices
        )

    def init_weights(self) -> None:
        """Draw all weights anew, as the constructor does; after `to_empty`, for instance."""
        self.backbone.init_weights()
        reset_layers(self.norms)

    def forward(self, image: Tensor) -> list[Tensor]:
        """(B, C, height, width) image to one (B, d, H, W) map per index."""
        maps = self.backbone.forward_intermediates(
            image,
            list(self.out_indices),
            intermediates_only=True,
            source=self.source,
        )
        return [
            norm(x.movedim(1, -1).to(norm.weight.dtype)).movedim(-1, 1)
            for norm, x in zip(self.norms, maps, strict=True)
        ]
