"""Region proposals: where objects of any class may be.

B  batch, h w  cells of a level's map
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import box_iou

from fastvim.errors import require_finite
from fastvim.models.heads.pyramid import LEVELS
from fastvim.models.heads.regions import OffsetCoder, Size, full_precision

RATIOS = (0.5, 1.0, 2.0)  # height to width
OBJECT_IOU, BACKGROUND_IOU = 0.7, 0.3


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


class ProposalNetwork(RegionProposalNetwork):
    """Two convolutions over each level, and three anchors per cell.

    Anchors are matched as published: those that cross the border of the padded image take no part.
    An anchor with an IoU of 0.7 is an object's, one with less than 0.3 of all objects is
    background. An object whose best anchor has at least 0.3 gets all anchors that fit it equally
    well, even if another object fits them better.

    Args:
        channels: of the pyramid.
        stride: of its finest level, in pixels.
        proposals: maximum per image in a test, and twice as many in training.
        candidates: of each level, that go into non-maximum suppression, in training twice as many;
            None: as many as proposals.
    """

    def __init__(
        self, channels: int, stride: int, proposals: int, candidates: int | None = None
    ) -> None:
        candidates = candidates or proposals
        super().__init__(
            Anchors(stride),
            ProposalHead(channels, len(RATIOS), conv_depth=2),
            fg_iou_thresh=OBJECT_IOU,
            bg_iou_thresh=BACKGROUND_IOU,
            batch_size_per_image=256,
            positive_fraction=0.5,
            pre_nms_top_n={"training": 2 * candidates, "testing": candidates},
            post_nms_top_n={"training": 2 * proposals, "testing": proposals},
            nms_thresh=0.7,
        )
        self.box_coder = OffsetCoder()
        self.min_size = torch.finfo(torch.float32).tiny  # whatever has an area is kept
        self._padded: Size = (0, 0)

    def forward(
        self,
        images: ImageList,
        features: dict[str, Tensor],
        targets: list[dict[str, Tensor]] | None = None,
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Per image the proposals (n, 4), the best first; in training the losses."""
        self._padded = images.image_sizes[0]
        return super().forward(images, features, targets)

    def filter_proposals(
        self,
        proposals: Tensor,
        objectness: Tensor,
        image_shapes: list[Size],
        num_anchors_per_level: list[int],
    ) -> tuple[list[Tensor], list[Tensor]]:
        """As torchvision's.

        Raises:
            NotFiniteError: in evaluation, for values that are not finite.
        """
        if not self.training:
            require_finite(proposals, objectness)
        return super().filter_proposals(proposals, objectness, image_shapes, num_anchors_per_level)

    def assign_targets_to_anchors(
        self, anchors: list[Tensor], targets: list[dict[str, Tensor]]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Per image what each anchor is, see `match`, and the box of its object."""
        matches = [
            match(a, t["boxes"], self._padded) for a, t in zip(anchors, targets, strict=True)
        ]
        boxes = [
            target["boxes"][objects] if len(target["boxes"]) else torch.zeros_like(some)
            for (_, objects), target, some in zip(matches, targets, anchors, strict=True)
        ]
        return [states for states, _ in matches], boxes

    def compute_loss(
        self,
        objectness: Tensor,
        pred_bbox_deltas: Tensor,
        labels: list[Tensor],
        regression_targets: list[Tensor],
    ) -> tuple[Tensor, Tensor]:
        """The losses of sampled anchors, of all images together: is it an object's, and where.

        As published, both are divided by the number of anchors, and an image without an object's
        anchor counts as if it had one.
        """
        samples = self.fg_bg_sampler(labels)
        # Numbers stay on the device.
        numbers = [p.sum().clamp(min=1) + n.sum() for p, n in zip(*samples, strict=True)]
        count = torch.stack(numbers).sum()
        positive, negative = (torch.cat(each) > 0 for each in samples)
        wanted = torch.cat(labels)
        losses = F.binary_cross_entropy_with_logits(objectness[:, 0], wanted, reduction="none")
        distance = F.smooth_l1_loss(
            pred_bbox_deltas[positive],
            torch.cat(regression_targets)[positive],
            beta=1 / 9,
            reduction="sum",
        )
        return losses[positive | negative].sum() / count, distance / count


def match(anchors: Tensor, boxes: Tensor, padded: Size) -> tuple[Tensor, Tensor]:
    """What each anchor is, and the index of its object, as `ProposalNetwork` describes.

    Args:
        anchors: (A, 4).
        boxes: of an image's objects, (n, 4).
        padded: height and width of the padded image.

    Returns:
        (A,) float: 1 for an object's, 0 for background, -1 for neither; (A,) int64, 0 for an anchor
        without an object.
    """
    height, width = padded
    inside = (anchors[:, :2] >= 0).all(dim=1)
    inside &= (anchors[:, 2] < width) & (anchors[:, 3] < height)
    states = anchors.new_zeros(len(anchors))
    objects = torch.zeros(len(anchors), dtype=torch.int64, device=anchors.device)
    if len(boxes):
        overlaps = box_iou(boxes, anchors).masked_fill(~inside, -1)
        most, objects = overlaps.max(dim=0)
        states[most >= BACKGROUND_IOU] = -1
        states[most >= OBJECT_IOU] = 1
        # Of objects that claim the same anchor the last one gets it.
        best = overlaps.max(dim=1, keepdim=True).values
        claims = (overlaps == best) & (best >= BACKGROUND_IOU)
        numbers = torch.arange(1, len(boxes) + 1, device=anchors.device)[:, None]
        claimed = (claims * numbers).max(dim=0).values
        states[claimed > 0] = 1
        objects = torch.where(claimed > 0, claimed - 1, objects)
    states[~inside] = -1
    return states, objects
