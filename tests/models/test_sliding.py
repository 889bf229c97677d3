"""Sliding windows, and multi-scale and flip: each pixel is the mean of its predictions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastvim import UserError
from fastvim.models.heads.sliding import multi_scale_flip, sliding_window

sides = st.integers(1, 40)


def linear(image: Tensor) -> Tensor:
    """Logits of each pixel from itself and from its whole window."""
    return torch.cat([image, image.mean((2, 3), keepdim=True).expand_as(image)], dim=1)


def naive(image: Tensor, window: int, stride: int) -> Tensor:
    """The same, pixel by pixel; images of the window's size at least."""
    total = torch.zeros(1, 2, *image.shape[-2:])
    count = torch.zeros(image.shape[-2:])
    row_starts, column_starts = (
        {min(i * stride, size - window) for i in range(size)} for size in image.shape[-2:]
    )
    for row in row_starts:
        for column in column_starts:
            part = linear(image[:, :, row : row + window, column : column + window])
            for i in range(window):
                for j in range(window):
                    total[:, :, row + i, column + j] += part[:, :, i, j]
                    count[row + i, column + j] += 1
    return total / count


@pytest.mark.parametrize("size", [(6, 6), (6, 7), (9, 6), (11, 14)])
@pytest.mark.parametrize("stride", [1, 4, 6])
def test_mean_of_the_windows(size, stride):
    image = torch.randn(1, 1, *size)
    result = sliding_window(linear, image, 6, stride)
    torch.testing.assert_close(result, naive(image, 6, stride))


def test_one_window_is_the_direct_pass():
    image = torch.randn(2, 3, 16, 12)
    torch.testing.assert_close(
        sliding_window(linear, image, (16, 12), 5), linear(image), rtol=0, atol=0
    )


@given(height=sides, width=sides, window=st.integers(1, 20), share=st.floats(0.05, 1))
@settings(max_examples=50, deadline=None, derandomize=True)
def test_windows_of_one_size_cover_any_image(height, width, window, share):
    seen = []

    def identity(image: Tensor) -> Tensor:
        seen.append(tuple(image.shape[-2:]))
        return image

    image = torch.randn(1, 2, height, width)
    result = sliding_window(identity, image, window, max(1, int(window * share)))
    torch.testing.assert_close(result, image)
    assert set(seen) == {(window, window)}


def test_the_published_windows():
    """Of an image of 512 by 683: two, the second shifted back inside."""
    starts = []
    image = torch.arange(683.0).expand(1, 1, 512, 683)

    def record(part: Tensor) -> Tensor:
        starts.append(int(part[0, 0, 0, 0]))
        return part

    sliding_window(record, image, 512, 341)
    assert starts == [0, 171]


@pytest.mark.parametrize("stride", [0, 7, (3, 7)])
def test_a_stride_that_leaves_gaps(stride):
    with pytest.raises(UserError, match="at most the window 6"):
        sliding_window(linear, torch.randn(1, 1, 8, 8), 6, stride)


# Multi-scale and flip.


def lopsided(image: Tensor) -> Tensor:
    """Logits of each pixel that differ for the mirror image."""
    ramp = torch.linspace(-1, 1, image.shape[-1]).expand_as(image[:, :1])
    return torch.cat([image, ramp, image * ramp], dim=1)


def resized(x: Tensor, *size: int) -> Tensor:
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


def test_one_version_is_the_prediction_itself():
    image = torch.randn(2, 1, 7, 9)
    expected = resized(lopsided(image), 14, 12).log_softmax(dim=1)
    torch.testing.assert_close(multi_scale_flip(lopsided, image, (14, 12)), expected)


def test_the_mean_is_of_probabilities():
    image = torch.randn(1, 1, 8, 6) * 5
    result = multi_scale_flip(lopsided, image, (8, 6), scales=(0.5, 1.0, 1.25), flip=True)
    total = torch.zeros(1, 3, 8, 6)
    for height, width in ((4, 3), (8, 6), (10, 8)):  # 7.5 pixels become 8
        version = resized(image, height, width)
        for logits in (lopsided(version), lopsided(version.flip(-1)).flip(-1)):
            total += resized(logits, 8, 6).softmax(dim=1)
    torch.testing.assert_close(result.exp(), total / 6)


def test_with_flip_a_mirror_image_gives_the_mirror_image():
    image = torch.randn(1, 1, 6, 8)
    one, other = (multi_scale_flip(lopsided, x, (6, 8), flip=True) for x in (image, image.flip(-1)))
    torch.testing.assert_close(one, other.flip(-1))
    assert not torch.allclose(lopsided(image), lopsided(image.flip(-1)).flip(-1))


def test_certain_predictions_keep_their_logarithms():
    """A probability too small for float32 keeps a finite logarithm."""
    image = torch.full((1, 1, 4, 4), 500.0)
    result = multi_scale_flip(lopsided, image, (4, 4), scales=(1.0, 2.0))
    assert result.isfinite().all()
    assert result.min() < -400
