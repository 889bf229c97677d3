"""Augmentation of images with any number of channels: what each step does."""

from __future__ import annotations

import math
import pickle
import random
from collections import Counter

import numpy as np
import pytest
import torch
from channel_images import STILL, noise, orientations, plain

from fastvim.data.channel_transforms import (
    CoarseDropout,
    Defocus,
    Pad,
    Rotate,
    disk,
    evaluation_transform,
    rotate,
    training_transform,
)
from fastvim.data.sampler import seeded
from fastvim.errors import UserError


def test_evaluation_is_normalisation_alone() -> None:
    image = noise(2, 12, 12).to(torch.uint8)
    expected = (image.float() - torch.tensor([3.0, 7.0])[:, None, None]) / 5
    assert torch.equal(evaluation_transform(12, (3.0, 7.0), (5.0, 5.0))(image), expected)


def test_evaluation_crops_the_centre_and_normalises_each_channel() -> None:
    image = noise(3, 20, 31)
    result = evaluation_transform((8, 11), (1.0, 2.0, 3.0), (4.0, 5.0, 6.0))(image)
    expected = torch.stack(
        [(image[c, 6:14, 10:21] - mean) / std for c, mean, std in ((0, 1, 4), (1, 2, 5), (2, 3, 6))]
    )
    torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("channels", [1, 2, 5, 8])
@pytest.mark.parametrize("shape", [(30, 40), (40, 12), (7, 9), (16, 20)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_any_size_and_number_of_channels(
    channels: int, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    always = {"orientation": 1.0, "defocus": 1.0, "dropout": 1.0}
    transforms = [
        evaluation_transform((16, 20), *plain(channels)),
        training_transform((16, 20), *plain(channels), min_size=24, **always),
    ]
    for transform in pickle.loads(pickle.dumps(transforms)):
        result = transform(noise(channels, *shape).to(dtype))
        assert result.shape == (channels, 16, 20)
        assert result.dtype == torch.float32
        assert result.is_contiguous()


def test_stored_integers_become_float() -> None:
    image = noise(2, 12, 12).to(torch.uint8)
    result = evaluation_transform(12, *plain(2))(image)
    assert torch.equal(result, image.float())


def test_padding_keeps_the_image_in_the_middle() -> None:
    image = noise(2, 5, 9)
    padded = Pad(8, 12)(image)
    assert padded.shape == (2, 8, 12)
    assert torch.equal(padded[:, 1:6, 1:10], image)  # the odd row and column are the last
    assert padded.count_nonzero() == image.numel()  # and zeros all around
    assert Pad(4, 9)(image) is image  # never cut
    assert torch.equal(
        evaluation_transform(8, *plain(2))(noise(2, 4, 4))[:, 2:6, 2:6], noise(2, 4, 4)
    )


def test_padding_is_zeros_and_cuts_nothing() -> None:
    image = noise(2, 9, 7).to(torch.uint8)
    with seeded(0):
        for _ in range(50):
            padded = Pad(12, 12, random=True)(image)
            assert padded.shape == (2, 12, 12)
            top, left = (int(padded[0].any(1 - axis).nonzero()[0]) for axis in (0, 1))
            assert torch.equal(padded[:, top : top + 9, left : left + 7], image)
            assert padded.count_nonzero() == image.numel()
    assert Pad(9, 7, random=True)(image) is image


def test_every_place_is_cropped() -> None:
    image = torch.arange(1.0, 21.0).view(1, 4, 5)
    crop = training_transform((2, 3), *plain(1), **STILL)
    with seeded(0):
        corners = Counter(float(crop(image).min()) for _ in range(900))
    assert set(corners) == {1, 2, 3, 6, 7, 8, 11, 12, 13}
    assert min(corners.values()) > 60


@pytest.mark.parametrize(
    ("size", "rotation", "expected"),
    [(4, "quarter", 6), (4, "none", 3), ((4, 6), "quarter", 4), ((4, 6), "none", 3)],
)
def test_other_orientations(size: int | tuple[int, int], rotation: str, expected: int) -> None:
    """Options: rotations that mix no pixels, or none; a probability that makes all equal."""
    height, width = (size, size) if isinstance(size, int) else size
    image = noise(3, height, width)
    settings = {**STILL, "orientation": 1 - 1 / expected, "rotation": rotation}
    transform = training_transform(size, *plain(3), **settings)
    seen: Counter[str] = Counter()
    with seeded(0):
        for _ in range(600):
            result = transform(image)
            found = (n for n, other in orientations(image).items() if torch.equal(result, other))
            seen[next(found)] += 1
    assert len(seen) == expected
    assert min(seen.values()) > 0.75 * 600 / expected


def rotated(image: np.ndarray, degrees: float) -> np.ndarray:
    """What `rotate` should give, pixel by pixel in float64."""
    height, width = image.shape[1:]
    result = np.empty_like(image)
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    middle_y, middle_x = (height - 1) / 2, (width - 1) / 2
    for row in range(height):
        for column in range(width):
            y, x = row - middle_y, column - middle_x
            from_y, from_x = sine * x + cosine * y + middle_y, cosine * x - sine * y + middle_x
            top, left = math.floor(from_y), math.floor(from_x)
            share_y, share_x = from_y - top, from_x - left
            result[:, row, column] = sum(
                abs(1 - dy - share_y)
                * abs(1 - dx - share_x)
                * image[:, mirrored(top + dy, height), mirrored(left + dx, width)]
                for dy in (0, 1)
                for dx in (0, 1)
            )
    return result


def mirrored(index: int, size: int) -> int:
    """An index of an axis that is mirrored at its first and last element, which count once."""
    index = abs(index) % (2 * size - 2)
    return min(index, 2 * size - 2 - index)


@pytest.mark.parametrize("degrees", [-270.0, -133.7, -90.0, -3.0, 0.5, 31.0, 45.0, 178.0, 261.2])
@pytest.mark.parametrize("shape", [(2, 24, 24), (3, 12, 31)])
def test_rotation_is_bilinear_about_the_middle(degrees: float, shape: tuple[int, ...]) -> None:
    image = noise(*shape)
    expected = rotated(image.double().numpy(), degrees)
    # Values differ by up to 254 from pixel to pixel, coordinates are good to 31 * 2^-23.
    np.testing.assert_allclose(rotate(image, degrees).numpy(), expected, rtol=0, atol=5e-3)
    whole = rotate(image.to(torch.uint8), degrees)
    assert whole.dtype == torch.uint8
    assert np.abs(whole.numpy() - expected).max() < 0.505


def test_rotation_by_quarters_is_exact() -> None:
    image = noise(2, 15, 15).to(torch.uint8)
    for quarter in (-3, -2, -1, 0, 1, 2, 3):
        assert torch.equal(rotate(image, 90 * quarter), torch.rot90(image, quarter, (1, 2)))


@pytest.mark.parametrize("limit", [90, 180, 270])
def test_angles_are_uniform_within_the_limit(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    angles: list[float] = []
    monkeypatch.setattr(
        "fastvim.data.channel_transforms.rotate", lambda _, degrees: angles.append(degrees)
    )
    with seeded(0):
        for _ in range(2000):
            Rotate(limit)(torch.empty(0))
    counts, _ = np.histogram(angles, bins=10, range=(-limit, limit))
    assert counts.sum() == 2000
    assert np.abs(counts - 200).max() < 4 * math.sqrt(200 * 0.9)


def test_defocus_blurs_every_channel_alike() -> None:
    image = torch.zeros(3, 15, 15)
    image[:, 7, 7] = torch.tensor([1.0, 10.0, 100.0])
    with seeded(0):
        results = [Defocus()(image) for _ in range(20)]
    for result in results:
        torch.testing.assert_close(result[1:], result[:1] * torch.tensor([10.0, 100]).view(2, 1, 1))
        assert result[0].sum().item() == pytest.approx(1)


def test_defocus_mirrors_the_border() -> None:
    image = noise(1, 9, 6)
    order = [[mirrored(index, size) for index in range(-4, size + 4)] for size in (9, 6)]
    around = image[0].double().numpy()[np.ix_(*order)]
    with seeded(3):
        result = Defocus()(image)
    with seeded(3):
        radius = 1 + int(torch.randint(3, ()))
        kernel = disk(radius, float(torch.empty(()).uniform_(0.1, 0.5))).double().numpy()
    reach = radius + 1
    for row in range(9):
        for column in range(6):
            rows, columns = (slice(i + 4 - reach, i + 5 + reach) for i in (row, column))
            expected = (around[rows, columns] * kernel).sum()
            assert result[0, row, column].item() == pytest.approx(expected, rel=1e-5)
    whole = noise(2, 5, 5).to(torch.uint8)
    assert Defocus()(whole).dtype == torch.uint8
    assert torch.equal(Defocus()(torch.full_like(whole, 7)), torch.full_like(whole, 7))


def test_dropout_cuts_squares_of_zeros_from_every_channel() -> None:
    image = noise(4, 40, 60)
    before = image.clone()
    with seeded(0):
        results = [CoarseDropout(1, 10)(image) for _ in range(200)]
    assert torch.equal(image, before)
    rows, columns = set(), set()
    for result in results:
        holes = result == 0
        assert (holes == holes[0]).all()
        top, left = (int(place) for place in holes[0].nonzero()[0])
        assert holes[0, top : top + 10, left : left + 10].all()
        assert holes[0].sum() == 100
        assert torch.equal(result[~holes], image[~holes])
        rows.add(top)
        columns.add(left)
    assert (min(rows), max(rows)) == (0, 30)
    assert min(columns) < 3
    assert 48 <= max(columns) <= 50


def test_exactly_as_many_holes() -> None:
    # Holes of one pixel in an image so large that two of them hardly ever coincide.
    with seeded(0):
        counts = [
            int((CoarseDropout(10, 1)(torch.ones(1, 900, 900)) == 0).sum()) for _ in range(50)
        ]
    assert set(counts) == {10}


@pytest.mark.parametrize("step", ["orientation", "defocus", "dropout"])
def test_probabilities(step: str) -> None:
    image = noise(2, 16, 16)
    transform = training_transform(16, *plain(2), **{**STILL, step: 0.3})
    with seeded(0):
        changed = 0
        for _ in range(500):
            result = transform(image)
            changed += not torch.equal(result, image)
            # Holes are as in the stored values; nothing else makes a pixel 0.
            assert bool((result == 0).any()) <= (step == "dropout")
    assert 0.24 < changed / 500 < 0.36


def test_holes_are_stored_zeros() -> None:
    transform = training_transform(10, (3.0,), (2.0,), **{**STILL, "dropout": 1.0})
    assert torch.equal(transform(noise(1, 10, 10)), torch.full((1, 10, 10), -1.5))


def test_the_seed_alone_decides() -> None:
    image = noise(3, 40, 40)
    transform = training_transform(32, *plain(3), min_size=48)
    copy = pickle.loads(pickle.dumps(transform))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        first = [transform(image) for _ in range(10)]
        np.random.seed(5)  # neither this
        random.seed(5)  # nor this has a say
        torch.manual_seed(1)
        again = [copy(image) for _ in range(10)]
        torch.manual_seed(2)
        other = [transform(image) for _ in range(10)]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("make", [evaluation_transform, training_transform])
def test_an_image_of_other_channels(make) -> None:
    transform = make(16, *plain(5))
    with pytest.raises(UserError, match=r"^mean and std of 5 values: the image has 3 channels$"):
        transform(noise(3, 16, 16))


@pytest.mark.parametrize("make", [evaluation_transform, training_transform])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, (0.0,), (1.0,)), "img_size 0: expected 1 to 8192"),
        (((16, 0), (0.0,), (1.0,)), r"img_size \[16, 0\]: expected 1 to 8192"),
        (((16, 16, 3), (0.0,), (1.0,)), r"img_size \[16, 16, 3\]: expected a height"),
        ((16, (0.0, 0.0), (1.0, 0.0)), r"std \[1.0, 0.0\]: expected more than 0"),
        ((16, (0.0,), (float("nan"),)), "std .*: expected finite numbers, more than 0"),
        ((16, (0.0, 0.0), (1.0,)), "mean of 2 values, std of 1: expected as many"),
    ],
)
def test_mistakes(make, arguments: tuple, message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}"):
        make(*arguments)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_size": 0}, "min_size 0: expected 1 or more"),
        ({"defocus": 1.5}, "defocus 1.5: expected 0 to 1"),
        ({"dropout": -0.1}, "dropout -0.1: expected 0 to 1"),
        ({"dropout": float("nan")}, "dropout nan: expected finite numbers, 0 to 1"),
        ({"orientation": 2}, "orientation 2: expected 0 to 1"),
        ({"rotation": "half"}, "rotation 'half': expected one of 'any', 'quarter', 'none'"),
        ({"dropout_holes": 0}, "dropout_holes 0: expected 1 to 65536"),
        ({"dropout_size": 0}, "dropout_size 0: expected 1 to 65536"),
        ({"dropout_size": 17}, "dropout_size 17: expected at most img_size 16"),
    ],
)
def test_mistakes_in_augmentation(settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}"):
        training_transform((16, 20), *plain(1), **settings)


def test_an_image_too_small_for_the_disk() -> None:
    with pytest.raises(UserError, match=r"^defocus 0.5: expected 0, as img_size 4 is less than 5$"):
        training_transform((4, 20), *plain(1))
    always = {**STILL, "defocus": 1.0}
    assert training_transform(5, *plain(1), **always)(noise(1, 5, 5)).shape == (1, 5, 5)
