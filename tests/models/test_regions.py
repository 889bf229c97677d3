"""Regions: which level serves them, what they pool there, and how offsets move them."""

from __future__ import annotations

import math

import pytest
import torch
from torchvision.ops import roi_align

from fastvim.models.heads.pyramid import LEVELS
from fastvim.models.heads.regions import OffsetCoder, RegionPooling


def levels_of(stride: int, side: int) -> dict[str, torch.Tensor]:
    """Maps that hold the number of their level."""
    sides = [side // (stride * 2**i) for i in range(len(LEVELS))]
    return {
        n: torch.full((1, 1, s, s), float(i))
        for i, (n, s) in enumerate(zip(LEVELS, sides, strict=True))
    }


@pytest.mark.parametrize("stride", [2, 3, 4])
def test_the_level_follows_the_area(stride):
    """Each doubling from 28 cells of the finest level on goes one level up."""
    cells = [1e-3, 13, 27.9, 28.1, 55.9, 56.1, 111.9, 112.1, 223.9, 224.1, 400]
    sides = stride * torch.tensor(cells)
    boxes = [torch.stack([0 * sides, 0 * sides, sides / 2, 2 * sides], dim=1)]
    boxes.append(boxes[0][:3, [1, 0, 3, 2]])
    maps = {name: x.repeat(2, 1, 1, 1) for name, x in levels_of(stride, 1024 * stride).items()}
    pooled = RegionPooling(1, stride)(maps, boxes)
    expected = [0, 0, 0, 1, 1, 2, 2, 3, 3, 3, 3]
    assert pooled.flatten().tolist() == [*expected, *expected[:3]]


def test_pooling_takes_cells_at_their_middles():
    """Of a ramp of columns, a region pools its own columns' mean, of its own image."""
    ramp = (torch.arange(16) + 0.5).expand(2, 1, 16, 16) * torch.tensor([1.0, -1])[
        :, None, None, None
    ]
    maps = {name: ramp[..., :: 2**i, :: 2**i] for i, name in enumerate(LEVELS)}
    box = torch.tensor([[8.0, 8.0, 36.0, 36.0]])  # columns 2 to 9 at stride 4
    pooled = RegionPooling(7)(maps, [box, box])
    expected = 2 + torch.arange(7) + 0.5
    torch.testing.assert_close(pooled[0, 0], expected.expand(7, 7))
    torch.testing.assert_close(pooled[1, 0], -expected.expand(7, 7))


def test_no_regions_and_gradients():
    maps = {name: torch.rand(1, 3, 8, 8, requires_grad=True) for name in LEVELS}
    none = RegionPooling(7)(maps, [torch.zeros(0, 4)])
    assert none.shape == (0, 3, 7, 7)
    empty = torch.tensor([[4.0, 4.0, 4.0, 9.0]])
    pooled = RegionPooling(7)(maps, [torch.cat([empty, torch.tensor([[4.0, 4, 20, 20]])])])
    assert pooled.isfinite().all()
    direct = roi_align(maps["0"], [torch.tensor([[4.0, 4, 20, 20]])], 7, 0.25, 0, aligned=True)
    torch.testing.assert_close(pooled[1:], direct)
    pooled.sum().backward()
    assert all(maps[name].grad is not None for name in LEVELS[:4])


def test_sides_shrink_and_grow_by_the_same_factor_at_most():
    stds = (0.1, 0.1, 0.2, 0.2)
    box = torch.tensor([[100.0, 100.0, 200.0, 300.0]])
    far = torch.tensor([[0.0, 0.0, 1e4, -1e4, 0.0, 0.0, 1.0, -1.0]])
    moved = OffsetCoder(stds).decode_single(far, box)
    width, height = 100 * 62.5 / 2, 200 / 62.5 / 2
    expected = [150 - width, 200 - height, 150 + width, 200 + height]
    torch.testing.assert_close(moved[0, :4], torch.tensor(expected))
    width, height = 50 * math.exp(0.2), 100 * math.exp(-0.2)
    expected = [150 - width, 200 - height, 150 + width, 200 + height]
    torch.testing.assert_close(moved[0, 4:], torch.tensor(expected))
