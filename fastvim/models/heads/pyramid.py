"""Feature maps of several scales from one map.

B  batch, d  channels of the one map, C  channels of each level, H W  its grid
"""

from __future__ import annotations

from collections import OrderedDict

import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import Tensor, nn

# As torchvision's detectors name the levels, from the finest to the coarsest.
LEVELS = ("0", "1", "2", "3", "pool")


class ChannelNorm(LayerNorm2d):
    """Layer norm of the channels at each place; published detectors are built with this eps."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-5)


class SimpleFeaturePyramid(nn.Module):
    """Five maps at 1/4, 1/2, 1, 2 and 4 times the stride of one (ViTDet, arXiv 2203.16527).

    Strides 4, 8, 16, 32 and 64 for a backbone with patches of 16 pixels. Each of the first four
    comes from the one map on its own: by two transposed convolutions with a norm and GELU between
    them, by one transposed convolution, unchanged, and by a 2 x 2 maximum. A 1 x 1 and a 3 x 3
    convolution follow. The fifth is every second cell of the fourth. The maximum drops an odd last
    row or column.

    Args:
        embed_dim: d, divisible by 4.
        channels: C.
    """

    def __init__(self, embed_dim: int, channels: int = 256) -> None:
        super().__init__()
        half, quarter = embed_dim // 2, embed_dim // 4
        scalings = {
            "0": nn.Sequential(
                nn.ConvTranspose2d(embed_dim, half, 2, stride=2),
                ChannelNorm(half),
                nn.GELU(),
                nn.ConvTranspose2d(half, quarter, 2, stride=2),
            ),
            "1": nn.ConvTranspose2d(embed_dim, half, 2, stride=2),
            "2": nn.Identity(),
            "3": nn.MaxPool2d(2),
        }
        widths = {"0": quarter, "1": half, "2": embed_dim, "3": embed_dim}
        self.levels = nn.ModuleDict(
            {
                name: nn.Sequential(
                    scaling,
                    nn.Conv2d(widths[name], channels, 1, bias=False),
                    ChannelNorm(channels),
                    nn.Conv2d(channels, channels, 3, padding=1, bias=False),
                    ChannelNorm(channels),
                )
                for name, scaling in scalings.items()
            }
        )
        for layer in self.modules():  # the transposed convolutions keep PyTorch's values
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        """(B, d, H, W) to (B, C, 4H, 4W), (B, C, 2H, 2W), (B, C, H, W), and two smaller ones."""
        maps = OrderedDict((name, level(x)) for name, level in self.levels.items())
        maps["pool"] = F.max_pool2d(maps["3"], kernel_size=1, stride=2)
        return maps
