"""The simple feature pyramid: sizes, strides, and which cells each level's cells come from."""

from __future__ import annotations

import pytest
import torch

from fastvim.models.heads.pyramid import LEVELS, ChannelNorm, SimpleFeaturePyramid


@pytest.mark.parametrize("grid", [(8, 8), (7, 5), (2, 6), (13, 2)])
def test_sizes_of_the_levels(grid):
    """An odd last row or column is dropped by the maximum of 2 x 2 cells."""
    maps = SimpleFeaturePyramid(16, channels=8)(torch.randn(2, 16, *grid))
    h, w = grid
    half = (h // 2, w // 2)
    quarter = tuple(-(-side // 2) for side in half)
    sizes = [(4 * h, 4 * w), (2 * h, 2 * w), (h, w), half, quarter]
    assert tuple(maps) == LEVELS == ("0", "1", "2", "3", "pool")
    assert [tuple(x.shape) for x in maps.values()] == [(2, 8, *size) for size in sizes]


def test_default_has_256_channels():
    with torch.device("meta"):
        maps = SimpleFeaturePyramid(192)(torch.empty(1, 192, 64, 64))
    assert {x.shape[1] for x in maps.values()} == {256}
    assert [x.shape[-1] for x in maps.values()] == [256, 128, 64, 32, 16]


def test_channel_norm_is_a_layer_norm_of_each_cell():
    x = torch.randn(2, 6, 3, 4)
    norm = ChannelNorm(6)
    torch.nn.init.normal_(norm.weight)
    expected = torch.nn.functional.layer_norm(
        x.permute(0, 2, 3, 1), (6,), norm.weight, norm.bias, norm.eps
    )
    torch.testing.assert_close(norm(x).permute(0, 2, 3, 1), expected)


def test_cells_lie_at_their_stride():
    """A changed cell changes, at each level, the cells over it and one more for the 3 x 3."""
    torch.manual_seed(0)
    pyramid = SimpleFeaturePyramid(16, channels=8)
    before = torch.randn(1, 16, 8, 8)
    after = before.clone()
    after[..., 4, 2] += 5.0
    reached = {
        "0": (slice(15, 21), slice(7, 13)),
        "1": (slice(7, 11), slice(3, 7)),
        "2": (slice(3, 6), slice(1, 4)),
        "3": (slice(1, 4), slice(0, 3)),
    }
    for name, cells in reached.items():
        change = (pyramid(after)[name] - pyramid(before)[name]).abs().sum(dim=(0, 1))
        assert (change[cells] > 0).all(), name
        change[cells] = 0
        assert (change < 1e-5).all(), name
    maps = pyramid(before)
    assert torch.equal(maps["pool"], maps["3"][..., ::2, ::2])


def test_gradients_reach_every_parameter():
    pyramid = SimpleFeaturePyramid(16, channels=8)
    sum(
        x.square().mul(torch.rand_like(x)).sum() for x in pyramid(torch.randn(1, 16, 5, 3)).values()
    ).backward()
    for name, parameter in pyramid.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name
