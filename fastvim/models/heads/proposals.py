"""Region proposals: where objects of any class may be.

B  batch, h w  cells of a level's map
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead

from fastvim.models.heads.pyramid import LEVELS
from fastvim.models.heads.regions import OffsetCoder, full_precision

RATIOS = (0.5, 1.0, 2.0)  # height to width


class Anchors(AnchorGenerator):
    """Three boxes about each cell of each level, of 8 times its stride; nothing is rounded.

    A level's stride is twice that of the one before, whether or not its cells fill the image.

    Args:
        stride: of the finest level.
    """

    def __init__(self, stride: int) -> None:
        self.strides = [stride * 2**i for i in range(len(LEVELS))]
        super().__init__(tuple((8 * s,) for s in self.strides), (RATIOS,) * len(LEVELS))

    def generate_anchors(
        self,
        scales: Sequence[float],
        aspect_ratios: Sequence[float],
        dtype: torch.dtype = torch.float32,
        device: torch.device = torch.device("cpu"),  # noqa: B008,
    ) -> Tensor:
        """(3, 4): the boxes about the origin, of the area scale x scale."""
        ratios = torch.tensor(aspect_ratios, dtype=dtype, device=device).sqrt()
        sides = torch.stack([1 / ratios, ratios], dim=1) * scales[0]
        return torch.cat([-sides, sides], dim=1) / 2

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        """For each image the same anchors: level by level, row by row, cell by cell."""
        self.set_cell_anchors(feature_maps[0].dtype, feature_maps[0].device)
        grids = [list(x.shape[-2:]) for x in feature_maps]
        anchors = torch.cat(self.grid_anchors(grids, [[s, s] for s in self.strides]))
        return [anchors] * len(image_list.image_sizes)


class ProposalHead(RPNHead):
    """torchvision's, with float32 outputs: boxes are decoded in the dtype of the offsets."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Of each level's map (B, C, h, w): logits (B, 3, h, w) and offsets (B, 12, h, w)."""
        logits, offsets = super().forward(x)
        return [full_precision(t) for t in logits], [full_precision(t) for t in offsets]


def proposal_network(
    channels: int, stride: int, proposals: int, candidates: int | None = None
) -> RegionProposalNetwork:
    """Two convolutions over each level, and three anchors per cell.

    IoU thresholds and sampling are Faster R-CNN's.

    Args:
        channels: of the pyramid.
        stride: of its finest level, in pixels.
        proposals: maximum per image.
        candidates: of each level, that go into non-maximum suppression, in training twice as many;
            None: as many as proposals.
    """
    candidates = candidates or proposals
    network = RegionProposalNetwork(
        Anchors(stride),
        ProposalHead(channels, len(RATIOS), conv_depth=2),
        fg_iou_thresh=0.7,
        bg_iou_thresh=0.3,
        batch_size_per_image=256,
        positive_fraction=0.5,
        pre_nms_top_n={"training": 2 * candidates, "testing": candidates},
        post_nms_top_n={"training": proposals, "testing": proposals},
        nms_thresh=0.7,
    )
    network.box_coder = OffsetCoder()
    network.min_size = torch.finfo(torch.float32).tiny  # whatever has an area is kept
    return network
