"""The heads of Cascade Mask R-CNN: three stages of boxes and of masks, of torchvision's parts.

N  regions of a batch, image by image; K  classes with the background, which is class 0;
C  channels of the pyramid. Boxes are (x1, y1, x2, y2) in pixels of the padded batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.ops import batched_nms, clip_boxes_to_image, roi_align

from fastvim.errors import require_finite
from fastvim.models.heads.pyramid import ChannelNorm
from fastvim.models.heads.regions import OffsetCoder, RegionPooling, Size, full_precision

Target = dict[str, Tensor]

# Of each stage (arXiv 1712.00726): the IoU from which a region counts as an object, the standard
# deviations that box offsets are divided by, and the weight of the losses.
IOU_THRESHOLDS = (0.5, 0.6, 0.7)
BOX_STDS = ((0.1, 0.1, 0.2, 0.2), (0.05, 0.05, 0.1, 0.1), (0.033, 0.033, 0.067, 0.067))
LOSS_WEIGHTS = (1.0, 0.5, 0.25)
MASK_SIDE = 28  # rows and columns of a predicted mask


class HeadOptions(NamedTuple):
    """Sizes of the heads, and thresholds of their detections.

    Args:
        hidden_dim: width of a box head's last layer.
        samples: regions per image that each stage trains on, at most a quarter of them objects.
        score_thresh: minimum score of a detection.
        nms_thresh: IoU threshold of per-class NMS.
        detections: maximum per image.
    """

    hidden_dim: int = 1024
    samples: int = 512
    score_thresh: float = 0.05
    nms_thresh: float = 0.5
    detections: int = 100


class Samples(NamedTuple):
    """Regions to train on: per image their boxes, the objects they match, labels and offsets.

    Background has label 0; its matched object and offsets mean nothing. `given` marks the objects'
    own boxes.
    """

    boxes: list[Tensor]
    matched: list[Tensor]
    labels: list[Tensor]
    offsets: list[Tensor]
    given: list[Tensor]


class BoxStage(RoIHeads):
    """One stage: pooled regions to class logits and to a box for each class.

    Matching, sampling and non-maximum suppression are torchvision's.

    Args:
        channels: C.
        num_classes: K.
        iou: regions with at least this IoU are objects, the others background.
        stds: standard deviations of the offsets (x, y, width, height).
        options: sizes and thresholds.
        stride: of the pyramid's finest level.
    """

    def __init__(
        self,
        channels: int,
        num_classes: int,
        iou: float,
        stds: tuple[float, float, float, float],
        options: HeadOptions,
        stride: int = 4,
    ) -> None:
        super().__init__(
            box_roi_pool=RegionPooling(7, stride),
            box_head=FastRCNNConvFCHead(
                (channels, 7, 7), [channels] * 4, [options.hidden_dim], ChannelNorm
            ),
            box_predictor=FastRCNNPredictor(options.hidden_dim, num_classes),
            fg_iou_thresh=iou,
            bg_iou_thresh=iou,
            batch_size_per_image=options.samples,
            positive_fraction=0.25,
            bbox_reg_weights=None,
            score_thresh=options.score_thresh,
            nms_thresh=options.nms_thresh,
            detections_per_img=options.detections,
        )
        self.box_coder = OffsetCoder(stds)
        for layer in self.box_head:
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
        # As in Fast R-CNN (arXiv 1504.08083): an untrained stage hardly moves its boxes.
        nn.init.normal_(self.box_predictor.cls_score.weight, std=0.01)
        nn.init.normal_(self.box_predictor.bbox_pred.weight, std=0.001)
        nn.init.zeros_(self.box_predictor.cls_score.bias)
        nn.init.zeros_(self.box_predictor.bbox_pred.bias)

    def forward(self, features: Mapping[str, Tensor], boxes: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Class logits (N, K) and box offsets (N, 4K)."""
        logits, offsets = self.box_predictor(self.box_head(self.box_roi_pool(features, boxes)))
        return full_precision(logits), full_precision(offsets)

    @torch.no_grad()
    def sample(self, boxes: list[Tensor], targets: Sequence[Target]) -> Samples:
        """Sample regions to train on from `boxes` and the objects' own boxes."""
        own = [target["boxes"] for target in targets]
        candidates = self.add_gt_proposals(boxes, own)
        matched, labels = self.assign_targets_to_proposals(
            candidates, own, [target["labels"] for target in targets]
        )
        samples = Samples([], [], [], [], [])
        for i, sampled in enumerate(self.subsample(labels)):
            found, objects = candidates[i][sampled], matched[i][sampled]
            # Without an object all is background, whose offsets mean nothing.
            wanted = own[i][objects] if len(own[i]) else found
            samples.boxes.append(found)
            samples.matched.append(objects)
            samples.labels.append(labels[i][sampled])
            samples.offsets.append(self.box_coder.encode_single(wanted, found))
            samples.given.append(sampled >= len(boxes[i]))
        return samples

    def losses(self, logits: Tensor, offsets: Tensor, samples: Samples) -> tuple[Tensor, Tensor]:
        """Cross-entropy, and the L1 distance of the objects' offsets, per region."""
        labels = torch.cat(samples.labels)
        count = max(len(labels), 1)
        classifier = F.cross_entropy(logits, labels, reduction="sum") / count
        objects = labels > 0
        own = offsets.unflatten(1, (-1, 4))[objects, labels[objects]]
        wanted = torch.cat(samples.offsets)[objects]
        return classifier, F.l1_loss(own, wanted, reduction="sum") / count

    @torch.no_grad()
    def refine(
        self,
        logits: Tensor,
        offsets: Tensor,
        boxes: list[Tensor],
        padded: Size,
        labels: list[Tensor] | None = None,
    ) -> list[Tensor]:
        """The boxes of the next stage: each box moved by the offsets of one class, and clipped.

        For an object in training that class is its label: only the label's offsets are trained on
        it. For background in training, and for every box in a test (`labels` is None), it is the
        most likely class other than the background, whose offsets are never trained.
        """
        classes = logits[:, 1:].argmax(dim=1) + 1
        if labels is not None:
            known = torch.cat(labels)
            classes = torch.where(known > 0, known, classes)
        own = offsets.unflatten(1, (-1, 4))[
            torch.arange(len(classes), device=classes.device), classes
        ]
        moved = clip_boxes_to_image(self.box_coder.decode_single(own, torch.cat(boxes)), padded)
        return list(moved.split([len(box) for box in boxes]))

    def select(
        self, logits: Tensor, offsets: Tensor, boxes: list[Tensor], padded: Size
    ) -> list[Target]:
        """Per image "boxes" (n, 4), "labels" and "scores" (n,), the best first.

        Each region may be found once for each class.
        """
        moved = self.box_coder.decode_single(offsets, torch.cat(boxes)).unflatten(1, (-1, 4))
        moved = clip_boxes_to_image(moved[:, 1:], padded)
        counts = [len(box) for box in boxes]
        selected = []
        for candidates, scores in zip(
            moved.split(counts), logits.softmax(dim=1)[:, 1:].split(counts), strict=True
        ):
            regions, classes = torch.where(scores > self.score_thresh)
            found, values = candidates[regions, classes], scores[regions, classes]
            best = batched_nms(found, values, classes, self.nms_thresh)[: self.detections_per_img]
            selected.append(
                {"boxes": found[best], "labels": classes[best] + 1, "scores": values[best]}
            )
        return selected


class MaskStage(nn.Module):
    """Pooled regions to a mask for each class.

    Args:
        channels: C.
        num_classes: K.
        stride: of the pyramid's finest level.
    """

    def __init__(self, channels: int, num_classes: int, stride: int = 4) -> None:
        super().__init__()
        self.pool = RegionPooling(MASK_SIDE // 2, stride)
        self.head = MaskRCNNHeads(channels, [channels] * 4, 1, ChannelNorm)
        self.predictor = MaskRCNNPredictor(channels, channels, num_classes)
        # As published, these begin as PyTorch's do, not as torchvision's.
        self.predictor.conv5_mask.reset_parameters()
        self.predictor.mask_fcn_logits.reset_parameters()

    def forward(self, features: Mapping[str, Tensor], boxes: list[Tensor]) -> Tensor:
        """Logits (N, K, 28, 28) of the masks in boxes."""
        return full_precision(self.predictor(self.head(self.pool(features, boxes))))

    def loss(
        self,
        features: Mapping[str, Tensor],
        samples: Samples,
        padded: Size,
        targets: Sequence[Target],
    ) -> Tensor:
        """Binary cross-entropy of the mask of each object's class, the mean over 28 x 28 cells."""
        objects = [labels > 0 for labels in samples.labels]
        boxes = [box[mine] for box, mine in zip(samples.boxes, objects, strict=True)]
        labels = torch.cat([own[mine] for own, mine in zip(samples.labels, objects, strict=True)])
        logits = self(features, boxes)
        if not len(labels):
            return logits.sum() * 0
        wanted = [
            mask_targets(target["masks"], matched[mine], box, padded)
            for target, matched, mine, box in zip(
                targets, samples.matched, objects, boxes, strict=True
            )
        ]
        own = logits[torch.arange(len(labels), device=labels.device), labels]
        return F.binary_cross_entropy_with_logits(own, torch.cat(wanted).to(own.dtype))


def mask_targets(masks: Tensor, matched: Tensor, boxes: Tensor, padded: Size) -> Tensor:
    """What the masks in boxes should be: bool (n, 28, 28), where at least half is the object's.

    Args:
        masks: of an image's objects, (objects, H, W) of 0 and 1.
        matched: each box's object, (n,).
        boxes: (n, 4).
        padded: the batch's height and width.
    """
    height, width = masks.shape[1:]
    inside = F.pad(masks[:, None], (0, padded[1] - width, 0, padded[0] - height)).to(boxes.dtype)
    regions = torch.cat([matched[:, None].to(boxes.dtype), boxes], dim=1)
    shares = roi_align(inside, regions, MASK_SIDE, sampling_ratio=0, aligned=True)
    return shares[:, 0] >= 0.5


class CascadeHeads(nn.Module):
    """Three stages, each starting from the boxes of the one before; each learns masks as well.

    Args:
        channels: C.
        num_classes: K.
        options: sizes and thresholds.
        stride: of the pyramid's finest level.
    """

    def __init__(
        self,
        channels: int,
        num_classes: int,
        options: HeadOptions | None = None,
        stride: int = 4,
    ) -> None:
        super().__init__()
        options = options or HeadOptions()
        self.stages = nn.ModuleList(
            BoxStage(channels, num_classes, iou, stds, options, stride)
            for iou, stds in zip(IOU_THRESHOLDS, BOX_STDS, strict=True)
        )
        self.mask_stages = nn.ModuleList(
            MaskStage(channels, num_classes, stride) for _ in self.stages
        )

    def losses(
        self,
        features: Mapping[str, Tensor],
        proposals: list[Tensor],
        padded: Size,
        targets: Sequence[Target],
    ) -> dict[str, Tensor]:
        """The weighted losses of each stage: of classes, boxes, and the masks of its objects."""
        losses = {}
        boxes = proposals
        for i, (stage, masks) in enumerate(self._stages()):
            samples = stage.sample(boxes, targets)
            logits, offsets = stage(features, samples.boxes)
            classifier, box = stage.losses(logits, offsets, samples)
            weight = LOSS_WEIGHTS[i]
            losses[f"loss_classifier_{i}"] = weight * classifier
            losses[f"loss_box_reg_{i}"] = weight * box
            losses[f"loss_mask_{i}"] = weight * masks.loss(features, samples, padded, targets)
            if i + 1 < len(self.stages):
                moved = stage.refine(logits, offsets, samples.boxes, padded, samples.labels)
                # The next stage adds the objects' own boxes anew.
                boxes = [box[~own] for box, own in zip(moved, samples.given, strict=True)]
        return losses

    def detect(
        self, features: Mapping[str, Tensor], proposals: list[Tensor], padded: Size
    ) -> list[Target]:
        """Per image the boxes (n, 4), labels (n,), scores (n,) and masks (n, 1, 28, 28) in them.

        The mean of the stages' logits gives the scores, the last stage the boxes. Masks are the
        mean of the three heads' probabilities.
        """
        boxes = proposals
        all_logits = []
        stages = self._stages()
        for i, (stage, _) in enumerate(stages):
            logits, offsets = stage(features, boxes)
            require_finite(logits, offsets)
            all_logits.append(logits)
            if i + 1 < len(stages):
                boxes = stage.refine(logits, offsets, boxes, padded)
        found = stage.select(torch.stack(all_logits).mean(dim=0), offsets, boxes, padded)
        boxes = [one["boxes"] for one in found]
        labels = torch.cat([one["labels"] for one in found])
        masks = torch.stack([head(features, boxes).sigmoid() for _, head in stages])
        own = masks.mean(dim=0)[torch.arange(len(labels), device=labels.device), labels]
        for one, mask in zip(found, own[:, None].split([len(box) for box in boxes]), strict=True):
            one["masks"] = mask
        return found

    def _stages(self) -> list[tuple[BoxStage, MaskStage]]:
        stages = zip(self.stages, self.mask_stages, strict=True)
        return cast("list[tuple[BoxStage, MaskStage]]", list(stages))
