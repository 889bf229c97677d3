"""Patches of images of any size, and position embeddings on other grids."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastvim import UserError
from fastvim.layers import PatchEmbed, resize_grid
from fastvim.layers.embed import _cubic


def embed(patch: int = 4, stride: int | None = None, in_chans: int = 3, dim: int = 8) -> PatchEmbed:
    torch.manual_seed(0)
    return PatchEmbed(in_chans, dim, patch, stride)


def test_initial_values():
    layer = embed(patch=8, dim=256)
    weight = layer.proj.weight.detach()
    assert (layer.proj.bias == 0).all()
    torch.testing.assert_close(float(weight.std()), (3 * 8 * 8) ** -0.5, rtol=0.05, atol=0.0)
    assert weight.abs().max() < 3 * (3 * 8 * 8) ** -0.5  # LeCun-normal, truncated


@pytest.mark.parametrize("stride", [None, 4, 2, 3])
@pytest.mark.parametrize(("height", "width"), [(4, 4), (5, 4), (7, 18), (8, 8), (9, 23), (4, 37)])
def test_padding_at_the_bottom_and_right(height, width, stride):
    layer, step = embed(stride=stride), stride or 4
    image = torch.randn(2, 3, height, width)
    tokens, grid = layer(image), layer.grid_size(height, width)
    # The smallest sides of the form patch + k · stride that hold the image.
    padded = [min(s for s in range(side, 99) if (s - 4) % step == 0) for side in (height, width)]
    assert grid == tuple((side - 4) // step + 1 for side in padded)
    assert tokens.shape == (2, grid[0] * grid[1], 8)
    whole = torch.zeros(2, 3, *padded)
    whole[..., :height, :width] = image
    weight = layer.proj.weight.flatten(1)
    for row in range(grid[0]):
        for column in range(grid[1]):
            top, left = row * step, column * step
            patch = whole[:, :, top : top + 4, left : left + 4].flatten(1)
            token = tokens[:, row * grid[1] + column]  # row-major
            torch.testing.assert_close(token, patch @ weight.T + layer.proj.bias)


LAYOUTS = {
    "contiguous": lambda image: image,
    "channels_last": lambda image: image.contiguous(memory_format=torch.channels_last),
    "transposed": lambda image: image.mT.contiguous().mT,
    "part": lambda image: F.pad(image, (1, 2, 3, 1))[..., 3:-1, 1:-2],
}


@pytest.mark.parametrize("batch", [0, 1, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("height", "width"), [(4, 4), (8, 20), (12, 8), (7, 18), (4, 37)])
def test_the_matrix_product_is_the_convolution(height, width, layout, batch):
    """Tokens and gradients, with patches that do not overlap and patches that do."""
    image = LAYOUTS[layout](torch.randn(batch, 3, height, width))
    assert image.is_contiguous() == (layout == "contiguous") or batch == 0
    for stride in (4, 3):
        layer, convolved = embed(stride=stride), []
        torch.nn.init.normal_(layer.proj.bias)
        convolution = layer.proj.forward
        layer.proj.forward = lambda x: convolved.append(1) or convolution(x)  # noqa: B023
        own, copy = image.detach().requires_grad_(), image.detach().requires_grad_()
        tokens, grid = layer(own), layer.grid_size(height, width)
        assert len(convolved) == (0 if stride == 4 else 1)
        bottom, right = (-(side - 4) % stride for side in (height, width))
        expected = layer.proj(F.pad(copy, (0, right, 0, bottom)))
        assert grid == tuple(expected.shape[2:])
        expected = expected.flatten(2).mT
        torch.testing.assert_close(tokens, expected)
        probe = torch.randn_like(tokens)
        gradients, expected_gradients = (
            torch.autograd.grad(out, (x, *layer.parameters()), probe)
            for out, x in ((tokens, own), (expected, copy))
        )
        torch.testing.assert_close(gradients, expected_gradients)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 1, 8, 8), r"\(1, 1, 8, 8\).*3"),
        ((3, 8, 8), r"\(3, 8, 8\)"),
        ((1, 3, 3, 8), "3 x 8 pixels.*4 x 4"),
        ((1, 3, 8, 3), "8 x 3 pixels.*4 x 4"),
    ],
)
def test_bad_images(shape, message):
    with pytest.raises(UserError, match=message):
        embed()(torch.randn(shape))


def test_resize_is_bicubic_over_the_grid():
    position = torch.randn(1, 6, 5)
    resized = resize_grid(position, (2, 3), (4, 5))
    grid = position.reshape(1, 2, 3, 5).permute(0, 3, 1, 2)
    expected = F.interpolate(
        grid, size=(4, 5), mode="bicubic", align_corners=False, antialias=False
    )
    torch.testing.assert_close(resized.reshape(1, 4, 5, 5), expected.permute(0, 2, 3, 1))
    assert resize_grid(position, (2, 3), (2, 3)) is position


def test_resize_does_not_smooth_when_it_shrinks():
    """No antialiasing: of a checkerboard, every other cell survives in full contrast."""
    board = torch.tensor([1.0, -1.0]).repeat(8)[:15].expand(15, 15).reshape(1, 225, 1)
    shrunk = resize_grid(board, (15, 15), (5, 5))
    assert shrunk.abs().max() > 0.9


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_resize_keeps_the_dtype(dtype):
    position = torch.randn(1, 6, 5, dtype=dtype, requires_grad=True)
    resized = resize_grid(position, (2, 3), (4, 4))
    assert resized.dtype == dtype
    resized.sum().backward()
    assert position.grad.isfinite().all()


def test_a_constant_embedding_stays_constant():
    resized = resize_grid(torch.full((1, 9, 2), 0.7), (3, 3), (7, 2))
    torch.testing.assert_close(resized, torch.full((1, 14, 2), 0.7))


@pytest.mark.parametrize("sizes", [(14, 5), (14, 14), (3, 40), (1, 6), (9, 1)])
def test_the_cubic_weights_of_exported_programs(sizes):
    old, new = sizes
    row = torch.randn(1, 1, 1, old, dtype=torch.float64)
    expected = F.interpolate(row, size=(1, new), mode="bicubic", align_corners=False)
    weights = _cubic(old, new, row.device)
    torch.testing.assert_close(row.float() @ weights.mT, expected.float())
    assert torch.equal(_cubic(new, new, row.device), torch.eye(new))
