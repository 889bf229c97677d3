"""The heads of Cascade Mask R-CNN: three box stages and a mask head, of torchvision's parts.

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
from torchvision.models.detection.roi_heads import RoIHeads, maskrcnn_inference, maskrcnn_loss
from torchvision.ops import MultiScaleRoIAlign, clip_boxes_to_image, remove_small_boxes

from fastvim.models.heads.pyramid import LEVELS, ChannelNorm

Sizes = Sequence[tuple[int, int]]
Target = dict[str, Tensor]

# Of each stage (arXiv 1712.00726): the IoU from which a region counts as an object, the standard
# deviations that box offsets are divided by, and the weight of the losses.
IOU_THRESHOLDS = (0.5, 0.6, 0.7)
BOX_STDS = ((0.1, 0.1, 0.2, 0.2), (0.05, 0.05, 0.1, 0.1), (0.033, 0.033, 0.067, 0.067))
LOSS_WEIGHTS = (1.0, 0.5, 0.25)
_MIN_SIDE = 1e-2  # pixels; boxes with a shorter side are dropped


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

    Background has label 0; its matched object and offsets mean nothing.
    """

    boxes: list[Tensor]
    matched: list[Tensor]
    labels: list[Tensor]
    offsets: list[Tensor]


def full_precision(x: Tensor) -> Tensor:
    """Half precision to float32: bfloat16 has only 8 bits for a coordinate."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class BoxStage(RoIHeads):
    """One stage: pooled regions to class logits and to a box for each class.

    Matching, sampling and non-maximum suppression are torchvision's.

    Args:
        channels: C.
        num_classes: K.
        iou: regions with at least this IoU are objects, the others background.
        stds: standard deviations of the offsets (x, y, width, height).
        options: sizes and thresholds.
    """

    def __init__(
        self,
        channels: int,
        num_classes: int,
        iou: float,
        stds: tuple[float, float, float, float],
        options: HeadOptions,
    ) -> None:
        super().__init__(
            box_roi_pool=MultiScaleRoIAlign(LEVELS[:4], output_size=7, sampling_ratio=0),
            box_head=FastRCNNConvFCHead(
                (channels, 7, 7), [channels] * 4, [options.hidden_dim], ChannelNorm
            ),
            box_predictor=FastRCNNPredictor(options.hidden_dim, num_classes),
            fg_iou_thresh=iou,
            bg_iou_thresh=iou,
            batch_size_per_image=options.samples,
            positive_fraction=0.25,
            bbox_reg_weights=tuple(1 / std for std in stds),
            score_thresh=options.score_thresh,
            nms_thresh=options.nms_thresh,
            detections_per_img=options.detections,
        )
        # As in Fast R-CNN (arXiv 1504.08083): an untrained stage hardly moves its boxes.
        nn.init.normal_(self.box_predictor.cls_score.weight, std=0.01)
        nn.init.normal_(self.box_predictor.bbox_pred.weight, std=0.001)
        nn.init.zeros_(self.box_predictor.cls_score.bias)
        nn.init.zeros_(self.box_predictor.bbox_pred.bias)

    def forward(
        self, features: Mapping[str, Tensor], boxes: list[Tensor], padded: Sizes
    ) -> tuple[Tensor, Tensor]:
        """Class logits (N, K) and box offsets (N, 4K); `padded`: the batch's height and width."""
        logits, offsets = self.box_predictor(
            self.box_head(self.box_roi_pool(features, boxes, padded))
        )
        return full_precision(logits), full_precision(offsets)

    @torch.no_grad()
    def sample(self, boxes: list[Tensor], targets: Sequence[Target]) -> Samples:
        """Sample regions to train on from `boxes` and the objects' own boxes."""
        found, matched, labels, offsets = self.select_training_samples(boxes, targets)
        return Samples(found, matched, labels, list(offsets))

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
        sizes: Sizes,
        labels: list[Tensor] | None = None,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The boxes of the next stage: each box moved by the offsets of one class.

        For an object in training that class is its label: only the label's offsets are trained on
        it. For background in training, and for every box in a test (`labels` is None), it is the
        most likely class other than the background, whose offsets are never trained.

        Returns:
            Per image the boxes, clipped to the image, and the indices of the boxes that they come
            from. Boxes that vanish are dropped.
        """
        classes = logits[:, 1:].argmax(dim=1) + 1
        if labels is not None:
            known = torch.cat(labels)
            classes = torch.where(known > 0, known, classes)
        own = offsets.unflatten(1, (-1, 4))[
            torch.arange(len(classes), device=classes.device), classes
        ]
        moved = self.box_coder.decode_single(own, torch.cat(boxes))
        refined, origins = [], []
        for one, size in zip(moved.split([len(b) for b in boxes]), sizes, strict=True):
            one = clip_boxes_to_image(one, size)
            origin = remove_small_boxes(one, _MIN_SIDE)
            refined.append(one[origin])
            origins.append(origin)
        return refined, origins


class CascadeHeads(nn.Module):
    """Three box stages, each starting from the boxes of the one before, and one mask head.

    As in ViTDet the mask head is trained on the objects among the first stage's regions, which are
    the region proposals, and applied to the last stage's boxes in a test.

    Args:
        channels: C.
        num_classes: K.
        options: sizes and thresholds.
    """

    def __init__(self, channels: int, num_classes: int, options: HeadOptions | None = None) -> None:
        super().__init__()
        options = options or HeadOptions()
        self.stages = nn.ModuleList(
            BoxStage(channels, num_classes, iou, stds, options)
            for iou, stds in zip(IOU_THRESHOLDS, BOX_STDS, strict=True)
        )
        self.mask_roi_pool = MultiScaleRoIAlign(LEVELS[:4], output_size=14, sampling_ratio=0)
        self.mask_head = MaskRCNNHeads(channels, [channels] * 4, 1, ChannelNorm)
        self.mask_predictor = MaskRCNNPredictor(channels, channels, num_classes)

    def losses(
        self,
        features: Mapping[str, Tensor],
        proposals: list[Tensor],
        sizes: Sizes,
        padded: Sizes,
        targets: Sequence[Target],
    ) -> dict[str, Tensor]:
        """The weighted losses of each stage, and of the masks."""
        losses = {}
        boxes = proposals
        for i, (stage, weight) in enumerate(zip(self._stages(), LOSS_WEIGHTS, strict=True)):
            samples = stage.sample(boxes, targets)
            logits, offsets = stage(features, samples.boxes, padded)
            classifier, box = stage.losses(logits, offsets, samples)
            losses[f"loss_classifier_{i}"] = weight * classifier
            losses[f"loss_box_reg_{i}"] = weight * box
            if i == 0:
                losses["loss_mask"] = self._mask_loss(features, samples, padded, targets)
            if i + 1 < len(self.stages):
                boxes, _ = stage.refine(logits, offsets, samples.boxes, sizes, samples.labels)
        return losses

    def detect(
        self,
        features: Mapping[str, Tensor],
        proposals: list[Tensor],
        sizes: Sizes,
        padded: Sizes,
    ) -> list[Target]:
        """Per image the boxes (n, 4), labels (n,), scores (n,) and masks (n, 1, 28, 28) in them.

        A region's scores are the mean of the three stages' scores; its boxes are the last stage's.
        """
        boxes = proposals
        scores = [proposals[0].new_zeros(())] * len(proposals)
        stages = self._stages()
        last = len(stages) - 1
        for i, stage in enumerate(stages):
            logits, offsets = stage(features, boxes, padded)
            each = logits.softmax(dim=1).split([len(b) for b in boxes])
            scores = [total + one / (last + 1) for total, one in zip(scores, each, strict=True)]
            if i < last:
                boxes, origins = stage.refine(logits, offsets, boxes, sizes)
                scores = [s[origin] for s, origin in zip(scores, origins, strict=True)]
        # It takes logits; the log of the mean probabilities serves, since they add up to 1.
        found, values, labels = stages[last].postprocess_detections(
            torch.cat(scores).log(), offsets, boxes, sizes
        )
        masks = maskrcnn_inference(self._mask_logits(features, found, padded), labels)
        return [
            {"boxes": b, "labels": n, "scores": s, "masks": m}
            for b, n, s, m in zip(found, labels, values, masks, strict=True)
        ]

    def _stages(self) -> list[BoxStage]:
        return cast("list[BoxStage]", list(self.stages))

    def _mask_logits(
        self, features: Mapping[str, Tensor], boxes: list[Tensor], padded: Sizes
    ) -> Tensor:
        """Logits (N, K, 28, 28) of the masks in boxes."""
        regions = self.mask_roi_pool(features, boxes, padded)
        return full_precision(self.mask_predictor(self.mask_head(regions)))

    def _mask_loss(
        self,
        features: Mapping[str, Tensor],
        samples: Samples,
        padded: Sizes,
        targets: Sequence[Target],
    ) -> Tensor:
        """Binary cross-entropy of the mask of each object's class, the mean over 28 x 28 cells."""
        objects = [labels > 0 for labels in samples.labels]
        boxes = [b[mine] for b, mine in zip(samples.boxes, objects, strict=True)]
        matched = [m[mine] for m, mine in zip(samples.matched, objects, strict=True)]
        logits = self._mask_logits(features, boxes, padded)
        masks, labels = [t["masks"] for t in targets], [t["labels"] for t in targets]
        return maskrcnn_loss(logits, boxes, masks, labels, matched)
