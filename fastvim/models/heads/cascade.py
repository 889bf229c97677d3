"""Cascade Mask R-CNN on a plain backbone: boxes and masks of objects.

The detector of arXiv 1712.00726 on the pyramid of ViTDet (arXiv 2203.16527), built from
torchvision's region proposals, pooling and matching.

B  batch, C  channels of the pyramid, H W  an image's height and width in pixels
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList

from fastvim.errors import UserError
from fastvim.models.feature_maps import FeatureMaps
from fastvim.models.heads.cascade_heads import CascadeHeads, HeadOptions, Target
from fastvim.models.heads.proposals import ProposalNetwork
from fastvim.models.heads.pyramid import SimpleFeaturePyramid
from fastvim.models.heads.regions import Size, full_precision
from fastvim.models.heads.results import paste_probabilities
from fastvim.models.intermediates import Source
from fastvim.models.vision import FastVim
from fastvim.options import COUNT, check

GREY = 114 / 255  # of the padding, before normalising


class PadImages(nn.Module):
    """Pad images at the bottom and right to one size, with grey, and normalise them.

    Args:
        mean, std: of each channel.
        multiple: padded sides are multiples of this, so that the levels' strides are exact.
        least: minimum of the padded sides.
    """

    def __init__(
        self, mean: Sequence[float], std: Sequence[float], multiple: int, least: int
    ) -> None:
        super().__init__()
        self.mean, self.std = list(mean), list(std)
        self.multiple, self.least = multiple, least

    def forward(self, images: Sequence[Tensor]) -> Tensor:
        """(in_chans, H, W) each to (B, in_chans, height, width)."""
        sides = [max(self.least, *(image.shape[axis] for image in images)) for axis in (1, 2)]
        height, width = (-(-side // self.multiple) * self.multiple for side in sides)
        batch = torch.stack(
            [F.pad(x, (0, width - x.shape[2], 0, height - x.shape[1]), value=GREY) for x in images]
        )
        mean, std = (batch.new_tensor(values)[:, None, None] for values in (self.mean, self.std))
        return (batch - mean) / std


class CascadeMaskRCNN(nn.Module):
    """Boxes, classes and masks of the objects in images of any size.

    Args:
        backbone: a `FastVim`, whose last block gives the map; or any module from
            (B, in_chans, H, W) to one map (B, d, H / stride, W / stride), alone or in a list.
        num_classes: classes of objects; their labels are 1 to `num_classes`.
        embed_dim: d; known for a `FastVim` and for `FeatureMaps`.
        stride: pixels between the map's cells, a multiple of 4; likewise known.
        channels: C.
        pad_to: images are padded to at least this height and width; 0: no more than necessary.
        image_mean, image_std: of each channel, for images with values in 0 to 1.
        proposals: regions that go from the proposal network to the first stage, per image.
        candidates: of each level, of which those are chosen; None: as many. Twice in training.
        heads: sizes and thresholds of the heads.

    Raises:
        UserError: a stride or a number of maps that the pyramid cannot take.
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        embed_dim: int | None = None,
        stride: int | None = None,
        channels: int = 256,
        pad_to: int = 0,
        image_mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
        image_std: Sequence[float] = IMAGENET_DEFAULT_STD,
        proposals: int = 1000,
        heads: HeadOptions | None = None,
        candidates: int | None = None,
    ) -> None:
        super().__init__()
        if isinstance(backbone, FastVim):
            backbone = FeatureMaps(backbone, [len(backbone.blocks) - 1])
        if isinstance(backbone, FeatureMaps):
            if len(backbone.out_indices) != 1:
                raise UserError(f"out_indices={backbone.out_indices}: expected one block")
            embed_dim = backbone.backbone.embed_dim
            stride = backbone.backbone.patch_embed.stride
        if embed_dim is None or stride is None:
            raise UserError(
                f"embed_dim={embed_dim}, stride={stride}: both are needed for a "
                f"{type(backbone).__name__}"
            )
        check(COUNT, num_classes=num_classes)
        if stride < 4 or stride % 4:
            raise UserError(f"stride={stride}: expected a multiple of 4, the finest level's cells")
        self.num_classes = num_classes
        self.transform = PadImages(image_mean, image_std, 2 * stride, pad_to)
        self.backbone = backbone
        self.pyramid = SimpleFeaturePyramid(embed_dim, channels)
        self.rpn = ProposalNetwork(channels, stride // 4, proposals, candidates)
        self.heads = CascadeHeads(channels, num_classes + 1, heads, stride // 4)

    def forward(
        self, images: Sequence[Tensor], targets: Sequence[Target] | None = None
    ) -> dict[str, Tensor] | list[Target]:
        """Losses in training, detections otherwise.

        Args:
            images: (in_chans, H, W) each, values in 0 to 1, of one size or several.
            targets: in training, per image "boxes" (n, 4) as x1, y1, x2, y2 in pixels, "labels"
                (n,) int64 from 1 on, and "masks" (n, H, W) of 0 and 1; n may be 0.

        Returns:
            In training the losses, weighted: their sum is to be minimised. Otherwise per image
            "boxes", "labels", "scores" (n,), the best first, and "masks" (n, 1, H, W): for each
            pixel the probability that it belongs to the object.

        Raises:
            UserError: no images, or some with other channels; no targets in training, or some that
                do not fit.
        """
        sizes = self._sizes(images)
        if not self.training:
            return [_pasted(*each) for each in zip(self.detect(images), sizes, strict=True)]
        if targets is None or len(targets) != len(images):
            count = "None" if targets is None else len(targets)
            raise UserError(f"targets of {count} images: expected {len(images)}, in training")
        for target, size in zip(targets, sizes, strict=True):
            _check(target, size, self.num_classes)
        dtype = torch.promote_types(images[0].dtype, torch.float32)
        targets = [{**target, "boxes": target["boxes"].to(dtype)} for target in targets]
        batch, padded, features = self._pyramid(images)
        proposals, losses = self.rpn(batch, features, targets)
        return {**losses, **self.heads.losses(features, proposals, padded, targets)}

    def detect(self, images: Sequence[Tensor]) -> list[Target]:
        """As `forward` in evaluation, but with "masks" (n, 1, 28, 28) that fill the boxes.

        Raises:
            NotFiniteError: scores or boxes that are not finite, a `UserError`.
        """
        self._sizes(images)
        batch, padded, features = self._pyramid(images)
        proposals, _ = self.rpn(batch, features)
        return self.heads.detect(features, proposals, padded)

    def _pyramid(self, images: Sequence[Tensor]) -> tuple[ImageList, Size, dict[str, Tensor]]:
        """The padded batch, its height and width, and its maps."""
        batch = self.transform(images)
        padded = (int(batch.shape[-2]), int(batch.shape[-1]))
        # Regions may reach into the padding: to all that follows, it is a part of the image.
        return ImageList(batch, [padded] * len(images)), padded, self.features(batch)

    def no_weight_decay(self) -> set[str]:
        """The backbone's vectors of both directions, stacked to two dimensions."""
        if not isinstance(self.backbone, FeatureMaps):
            return set()
        return {f"backbone.backbone.{name}" for name in self.backbone.backbone.no_weight_decay()}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layers for layer-wise decay: the embeddings, each block, the rest."""
        return {
            "stem": r"^backbone\.backbone\.(?:cls_token|pos_embed|patch_embed)",
            "blocks": [(r"^backbone\.backbone\.blocks\.(\d+)", None)],
        }

    def _sizes(self, images: Sequence[Tensor]) -> list[tuple[int, int]]:
        if not images:
            raise UserError("no images: expected one or more")
        channels = len(self.transform.mean)
        for image in images:
            if image.ndim != 3 or len(image) != channels:
                raise UserError(
                    f"an image of shape {tuple(image.shape)}: expected ({channels}, H, W), a mean "
                    "and a deviation per channel"
                )
            if not image.is_floating_point():
                raise UserError(f"an image of {image.dtype}: expected values in 0 to 1, floating")
        return [(int(image.shape[1]), int(image.shape[2])) for image in images]

    def features(self, images: Tensor) -> OrderedDict[str, Tensor]:
        """(B, in_chans, height, width), padded, to the levels of the pyramid."""
        maps = self.backbone(images)
        if not isinstance(maps, Tensor):
            if len(maps) != 1:
                raise UserError(f"the backbone returns {len(maps)} maps: expected one")
            maps = maps[0]
        # Anchors are laid out in the dtype of the maps.
        return OrderedDict((name, full_precision(x)) for name, x in self.pyramid(maps).items())


def build_detector(
    backbone: FastVim,
    num_classes: int,
    source: Source = "mixer",
    heads: Mapping[str, Any] | None = None,
    **options: Any,
) -> CascadeMaskRCNN:
    """A `CascadeMaskRCNN` from plain values, as a file of weights holds them.

    Args:
        backbone: its last block gives the map.
        num_classes: classes of objects.
        source: what the map is; see `FeatureMaps`.
        heads: fields of `HeadOptions`.
        **options: further ones of `CascadeMaskRCNN`.
    """
    maps = FeatureMaps(backbone, [len(backbone.blocks) - 1], source)
    return CascadeMaskRCNN(maps, num_classes, heads=HeadOptions(**heads or {}), **options)


def _pasted(found: Target, size: Size) -> Target:
    """Detections with masks (n, 1, H, W) instead of those that fill the boxes."""
    pasted = found["masks"].new_zeros(len(found["boxes"]), 1, *size)
    for i, (mask, box) in enumerate(zip(found["masks"], found["boxes"].tolist(), strict=True)):
        pasted[i, 0] = paste_probabilities(mask[0], box, size)
    return {**found, "masks": pasted}


def _check(target: Target, size: tuple[int, int], num_classes: int) -> None:
    """Raise a `UserError` for a target whose shapes, boxes or labels do not fit."""
    missing = {"boxes", "labels", "masks"} - target.keys()
    if missing:
        raise UserError(f"a target without {', '.join(sorted(missing))}")
    boxes, labels = target["boxes"], target["labels"]
    wanted = {"boxes": (len(labels), 4), "masks": (len(labels), *size)}
    for name, shape in wanted.items():
        if target[name].shape != shape:
            raise UserError(f"{name} of shape {tuple(target[name].shape)}: expected {shape}")
    if labels.dtype != torch.int64 or ((labels < 1) | (labels > num_classes)).any():
        raise UserError(f"labels {labels.tolist()}: expected int64 from 1 to {num_classes}")
    if not boxes.is_floating_point():
        raise UserError(f"boxes of {boxes.dtype}: expected a floating dtype")
    empty = ~(boxes[:, 2:] > boxes[:, :2]).all(dim=1)
    if empty.any():
        raise UserError(f"box {boxes[empty][0].tolist()}: expected x1 < x2 and y1 < y2")
