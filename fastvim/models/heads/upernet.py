"""UPerNet (arXiv 1807.10221): a class for every pixel, from the maps of a backbone.

B  batch, d  channels of a map, H W  its grid, K  classes
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvim.layers import same_grid
from fastvim.models.feature_maps import FeatureMaps
from fastvim.models.parts import reset_layers

Norm = Callable[[int], nn.Module]


class UPerNetHead(nn.Module):
    """Pools the last map over several grids, and fuses it with the maps before it.

    From the last map to the first, each is added to the one before it, resized to its grid. The
    result has the grid of the first.

    Args:
        in_chans: channels d of each map, the finest grid first.
        num_classes: K.
        channels: width of every convolution but the classifier.
        pool_scales: sides of the grids that the last map is averaged over.
        drop_rate: dropout of whole channels before the classifier.
        norm: after every convolution but the classifier. `nn.BatchNorm2d` becomes SyncBatchNorm
            under `nn.SyncBatchNorm.convert_sync_batchnorm`.
    """

    def __init__(
        self,
        in_chans: Sequence[int],
        num_classes: int,
        channels: int = 512,
        pool_scales: Sequence[int] = (1, 2, 3, 6),
        drop_rate: float = 0.1,
        norm: Norm = nn.BatchNorm2d,
    ) -> None:
        super().__init__()
        *finer, last = in_chans
        self.pools = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(scale), _convolution(last, channels, 1, norm))
            for scale in pool_scales
        )
        self.pooled = _convolution(last + len(pool_scales) * channels, channels, 3, norm)
        self.laterals = nn.ModuleList(_convolution(d, channels, 1, norm) for d in finer)
        self.smooth = nn.ModuleList(_convolution(channels, channels, 3, norm) for _ in finer)
        self.fusion = _convolution(len(in_chans) * channels, channels, 3, norm)
        self.drop = nn.Dropout2d(drop_rate)
        self.classifier = _Classifier(channels, num_classes, 1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """(B, d, H, W) maps, one per entry of `in_chans`, to logits (B, K, H, W) of the first."""
        sums = [self._pool(maps[-1])]
        for lateral, x in zip(reversed(self.laterals), reversed(maps[:-1]), strict=True):
            sums.insert(0, lateral(x) + _resize(sums[0], x.shape[-2:]))
        levels = [smooth(x) for smooth, x in zip(self.smooth, sums[:-1], strict=True)] + sums[-1:]
        grid = levels[0].shape[-2:]
        fused = self.fusion(torch.cat([_resize(x, grid) for x in levels], dim=1))
        return self.classifier(self.drop(fused))

    def _pool(self, x: Tensor) -> Tensor:
        context = [_resize(pool(x), x.shape[-2:]) for pool in self.pools]
        return self.pooled(torch.cat([x, *context], dim=1))


class FCNHead(nn.Module):
    """The auxiliary head, used in training alone: one 3x3 convolution and a classifier.

    Args:
        in_chans: channels d of the map.
        num_classes: K.
        channels: width of the convolution.
        drop_rate: dropout of whole channels before the classifier.
        norm: after the convolution; see `UPerNetHead`.
    """

    def __init__(
        self,
        in_chans: int,
        num_classes: int,
        channels: int = 256,
        drop_rate: float = 0.1,
        norm: Norm = nn.BatchNorm2d,
    ) -> None:
        super().__init__()
        self.convolution = _convolution(in_chans, channels, 3, norm)
        self.drop = nn.Dropout2d(drop_rate)
        self.classifier = _Classifier(channels, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, d, H, W) map to logits (B, K, H, W)."""
        return self.classifier(self.drop(self.convolution(x)))


class UPerNet(nn.Module):
    """A FastVim or Vim that labels pixels, as published: all maps at the stride of the patches.

    Args:
        maps: the backbone.
        num_classes: K.
        channels: width of the head.
        aux_channels: width of the auxiliary head.
        aux_map: index of the map that the auxiliary head reads.
        pool_scales: see `UPerNetHead`.
        drop_rate: of both heads.
        norm: of both heads; see `UPerNetHead`.
    """

    def __init__(
        self,
        maps: FeatureMaps,
        num_classes: int,
        channels: int = 512,
        aux_channels: int = 256,
        aux_map: int = -2,
        pool_scales: Sequence[int] = (1, 2, 3, 6),
        drop_rate: float = 0.1,
        norm: Norm = nn.BatchNorm2d,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.aux_map = aux_map
        self.maps = maps
        dim = maps.backbone.embed_dim
        in_chans = [dim] * len(maps.out_indices)
        self.head = UPerNetHead(in_chans, num_classes, channels, pool_scales, drop_rate, norm)
        self.aux_head = FCNHead(dim, num_classes, aux_channels, drop_rate, norm)

    def init_weights(self) -> None:
        """Draw all weights anew, as the constructor does; after `to_empty`, for instance."""
        self.maps.init_weights()
        reset_layers(self.head)
        reset_layers(self.aux_head)

    def no_weight_decay(self) -> set[str]:
        """The backbone's vectors of both directions, stacked to two dimensions."""
        return {f"maps.backbone.{name}" for name in self.maps.backbone.no_weight_decay()}

    def forward(self, image: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """(B, C, height, width) image to logits (B, K, height, width).

        In training a pair: these logits and the auxiliary head's.
        """
        maps = self.maps(image)
        logits = self._to_pixels(self.head(maps), image)
        if not self.training:
            return logits
        return logits, self._to_pixels(self.aux_head(maps[self.aux_map]), image)

    def _to_pixels(self, logits: Tensor, image: Tensor) -> Tensor:
        """Enlarge logits from the grid to the pixels."""
        height, width = image.shape[-2:]
        stride = self.maps.backbone.patch_embed.stride
        # The backbone pads the image at the bottom and right: its grid may reach beyond it.
        covered = max(logits.shape[-2] * stride, height), max(logits.shape[-1] * stride, width)
        return _resize(logits, covered)[..., :height, :width]


def _resize(x: Tensor, grid: Sequence[int]) -> Tensor:
    if same_grid((x.shape[-2], x.shape[-1]), (grid[0], grid[1])):
        return x
    return F.interpolate(x, size=tuple(grid), mode="bilinear", align_corners=False)


def _convolution(in_chans: int, out_chans: int, kernel: int, norm: Norm) -> nn.Sequential:
    convolution = _Convolution(in_chans, out_chans, kernel, padding=kernel // 2, bias=False)
    return nn.Sequential(convolution, norm(out_chans), nn.ReLU(inplace=True))


class _Convolution(nn.Conv2d):
    """A convolution before a norm."""

    def reset_parameters(self) -> None:
        """Kaiming normal, fan out."""
        super().reset_parameters()
        nn.init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="relu")


class _Classifier(nn.Conv2d):
    """Logits of each place."""

    def reset_parameters(self) -> None:
        """Normal 0.01, bias 0."""
        super().reset_parameters()
        nn.init.normal_(self.weight, std=0.01)
        assert self.bias is not None
        nn.init.zeros_(self.bias)
