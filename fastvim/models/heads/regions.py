"""Regions of an image: how their offsets move them, and their part of the pyramid.

N  regions of a batch, image by image; C  channels of the pyramid. Boxes are (x1, y1, x2, y2) in
pixels of the padded batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torchvision.models.detection._utils import BoxCoder
from torchvision.ops import roi_align

from fastvim.models.heads.pyramid import LEVELS

Size = tuple[int, int]  # height and width


def full_precision(x: Tensor) -> Tensor:
    """Half precision to float32: bfloat16 has only 8 bits for a coordinate."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class OffsetCoder(BoxCoder):
    """torchvision's, but that a side shrinks at most 62.5 times, as it grows.

    Args:
        stds: standard deviations of the offsets (x, y, width, height).
    """

    def __init__(self, stds: Sequence[float] = (1.0, 1.0, 1.0, 1.0)) -> None:
        x, y, width, height = (1 / std for std in stds)
        super().__init__((x, y, width, height))
        self.least = [-torch.inf] * 2 + [-self.bbox_xform_clip / std for std in stds[2:]]

    def decode_single(self, rel_codes: Tensor, boxes: Tensor) -> Tensor:
        """Offsets (N, 4K) from boxes (N, 4) to boxes (N, 4K)."""
        offsets = rel_codes.unflatten(1, (-1, 4))
        return super().decode_single(
            torch.maximum(offsets, offsets.new_tensor(self.least)).flatten(1), boxes
        )


class RegionPooling(nn.Module):
    """RoIAlign of each region from the level that fits its size.

    The finest level serves the regions that are smaller than 28 x 28 of its cells, by area; each
    further doubling of the side takes the next level: from 112, 224 and 448 pixels on, at stride 4.
    A cell's value lies at its middle (torchvision's `aligned`). The number of points that are
    sampled follows the region's size.

    Args:
        output_size: rows and columns that a region gives.
        stride: of the finest level, in pixels.
    """

    def __init__(self, output_size: int, stride: int = 4) -> None:
        super().__init__()
        self.output_size, self.stride = output_size, stride

    def forward(self, features: Mapping[str, Tensor], boxes: list[Tensor]) -> Tensor:
        """(N, C, output_size, output_size) of the boxes of each image."""
        maps = [features[name] for name in LEVELS[:-1]]
        images = [box.new_full((len(box), 1), i) for i, box in enumerate(boxes)]
        regions = torch.cat([torch.cat(images), torch.cat(boxes)], dim=1)
        sides = regions[:, 3:] - regions[:, 1:3]
        doublings = torch.log2(sides.prod(dim=1).sqrt() / (14 * self.stride) + 1e-6).floor()
        size = (self.output_size, self.output_size)
        pooled = maps[0].new_zeros(len(regions), maps[0].shape[1], *size)
        for level, x in enumerate(maps):
            mine = torch.where(doublings.clamp(0, len(maps) - 1) == level)[0]
            scale = 1 / (self.stride * 2**level)
            pooled[mine] = roi_align(
                x, regions[mine].to(x.dtype), size, scale, sampling_ratio=0, aligned=True
            )
        return pooled
