"""Resizing without antialiasing: OpenCV's, bit for bit."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastvim.data.resizing import fit, linear, resize

WHOLE = Path(__file__).parents[1] / "golden" / "whole"


@pytest.mark.parametrize(
    ("file", "stored", "resized"),
    [
        ("segmentor", "pipeline/image_bgr", "pipeline/resized_bgr"),
        ("detector", "image_bgr", "padded_bgr"),
    ],
)
def test_it_is_bit_for_bit_what_published_models_saw(file, stored, resized):
    arrays = np.load(WHOLE / f"{file}.npz")
    image, expected = arrays[stored], arrays[resized]
    height, width = image.shape[:2]
    bounds = (128, 128) if file == "detector" else (4 * 64, 64)
    size = fit((width, height), bounds)
    if file == "segmentor":
        assert size == expected.shape[1::-1]
    expected = expected[: size[1], : size[0]]  # the rest is padding
    assert np.array_equal(linear(image, size), expected)
    assert np.array_equal(linear(image[..., ::-1], size), expected[..., ::-1])
    ours = np.asarray(resize(Image.fromarray(image[..., ::-1]), size, antialias=False))
    assert np.array_equal(ours, expected[..., ::-1])
    smoothed = np.asarray(resize(Image.fromarray(image[..., ::-1]), size))
    assert not np.array_equal(smoothed, expected[..., ::-1])


def by_pixel(row: int, column: int, pixels: np.ndarray, size: tuple[int, int]) -> int:
    """One pixel of the result, in whole numbers."""

    def weights(index: int, wanted: int, stored: int) -> tuple[int, float]:
        position = (index + 0.5) * stored / wanted - 0.5
        return math.floor(position), np.float32(position) - np.float32(math.floor(position))

    height, width = pixels.shape
    left, share = weights(column, size[0], width)
    if left < 0 or left >= width - 1:
        left, share = min(max(left, 0), width - 1), 0.0
    top, below = weights(row, size[1], height)
    sums = []
    for line in (top, top + 1):
        values = [int(v) for v in pixels[min(max(line, 0), height - 1)]]
        sums.append(
            values[left] * round(2048 * (1 - share))
            + values[min(left + 1, width - 1)] * round(2048 * share)
        )
    parts = [round(2048 * (1 - below)), round(2048 * below)]
    return (sum((part * (s >> 4)) >> 16 for part, s in zip(parts, sums, strict=True)) + 2) >> 2


@pytest.mark.parametrize(
    ("stored", "wanted"),
    [
        ((7, 9), (23, 40)),  # larger
        ((31, 45), (11, 16)),  # smaller
        ((20, 30), (10, 15)),  # half
        ((5, 40), (9, 7)),  # larger one way, smaller the other
        ((1, 6), (3, 3)),
        ((6, 1), (4, 5)),
        ((1, 1), (2, 3)),
        ((50, 3), (1, 1)),
        ((8, 8), (8, 5)),  # rows stay
        ((4, 5), (40, 5)),  # more than a band of rows, columns stay
    ],
)
def test_every_pixel_is_that_of_the_plain_formula(stored, wanted):
    pixels = np.random.default_rng(0).integers(0, 256, stored, dtype=np.uint8)
    size = (wanted[1], wanted[0])
    result = linear(pixels, size)
    expected = [[by_pixel(i, j, pixels, size) for j in range(size[0])] for i in range(size[1])]
    assert result.dtype == np.uint8
    assert np.array_equal(result, expected)
    colours = np.stack([pixels, 255 - pixels, pixels // 2], axis=-1)
    assert np.array_equal(linear(colours, size)[..., 0], expected)


def test_an_image_of_that_size_stays_as_it_is():
    pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    assert np.array_equal(linear(pixels, (7, 9)), pixels)


def test_sides_are_rounded_as_published():
    """A side becomes int(side * scale + 0.5), for the greatest scale that fits."""
    generator = np.random.default_rng(0)
    for width, height in generator.integers(1, 5000, (2000, 2)).tolist():
        for longer, shorter in ((2048, 512), (1024, 1024)):
            scale = min(longer / max(width, height), shorter / min(width, height))
            expected = int(width * scale + 0.5), int(height * scale + 0.5)
            assert fit((width, height), (longer, shorter)) == tuple(max(1, s) for s in expected)
