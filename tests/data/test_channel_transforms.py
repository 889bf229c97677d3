"""Augmentation of images with any number of channels: what each step does."""

from __future__ import annotations

import pickle
import random
from collections import Counter

import numpy as np
import pytest
import torch
from torch import Tensor

from fastvim.data.channel_transforms import (
    CoarseDropout,
    Defocus,
    Pad,
    disk,
    evaluation_transform,
    training_transform,
)
from fastvim.data.sampler import seeded
from fastvim.errors import UserError

STILL = {"defocus": 0.0, "dropout": 0.0}


def noise(*shape: int) -> Tensor:
    """Stored values from 1 to 255: no pixel is 0."""
    values = np.random.default_rng(0).integers(1, 256, shape)
    return torch.from_numpy(values.astype(np.float32))


def plain(channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation that leave the stored values alone."""
    return (0.0,) * channels, (1.0,) * channels


def test_evaluation_crops_the_centre_and_normalises_each_channel() -> None:
    image = noise(3, 20, 31)
    result = evaluation_transform((8, 11), (1.0, 2.0, 3.0), (4.0, 5.0, 6.0))(image)
    expected = torch.stack(
        [(image[c, 6:14, 10:21] - mean) / std for c, mean, std in ((0, 1, 4), (1, 2, 5), (2, 3, 6))]
    )
    torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("channels", [1, 2, 5, 8])
@pytest.mark.parametrize("shape", [(30, 40), (40, 12), (7, 9), (16, 20)])
@pytest.mark.parametrize("make", [evaluation_transform, training_transform])
def test_any_size_and_number_of_channels(make, channels: int, shape: tuple[int, int]) -> None:
    transform = pickle.loads(pickle.dumps(make((16, 20), *plain(channels), min_size=24)))
    result = transform(noise(channels, *shape))
    assert result.shape == (channels, 16, 20)
    assert result.dtype == torch.float32


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


def test_padding_comes_before_the_random_crop() -> None:
    image = torch.ones(1, 8, 8)
    crop = training_transform(8, *plain(1), min_size=12, **STILL)
    with seeded(0):
        kept = {int(crop(image).sum()) for _ in range(200)}
        unpadded = {int(training_transform(8, *plain(1), **STILL)(image).sum()) for _ in range(20)}
    # The crop is displaced by up to 2 pixels along each axis.
    assert kept == {a * b for a in (6, 7, 8) for b in (6, 7, 8)}
    assert unpadded == {64}


def test_every_place_is_cropped() -> None:
    image = torch.arange(1.0, 21.0).view(1, 4, 5)
    crop = training_transform((2, 3), *plain(1), rotate=False, **STILL)
    with seeded(0):
        corners = Counter(float(crop(image).min()) for _ in range(900))
    # The least value is the upper left pixel, however the crop is flipped.
    assert set(corners) == {1, 2, 3, 6, 7, 8, 11, 12, 13}
    assert min(corners.values()) > 60


@pytest.mark.parametrize(
    ("size", "rotate", "expected"),
    [(4, True, 6), (4, False, 3), ((4, 6), True, 4), ((4, 6), False, 3)],
)
def test_orientations(size: int | tuple[int, int], rotate: bool, expected: int) -> None:
    height, width = (size, size) if isinstance(size, int) else size
    image = noise(3, height, width)
    turns = {f"by {90 * k}": torch.rot90(image, k, (1, 2)) for k in (1, 2, 3)}
    possible = {"same": image, "horizontal": image.flip(2), "vertical": image.flip(1), **turns}
    transform = training_transform(size, *plain(3), rotate=rotate, **STILL)
    seen: Counter[str] = Counter()
    with seeded(0):
        for _ in range(600):
            result = transform(image)
            seen[next(name for name, other in possible.items() if torch.equal(result, other))] += 1
    assert len(seen) == expected
    assert min(seen.values()) > 0.75 * 600 / expected


@pytest.mark.parametrize("radius", [1, 2, 3])
def test_the_disk(radius: int) -> None:
    kernel = disk(radius)
    assert kernel.shape == (2 * radius + 1, 2 * radius + 1)
    assert kernel.sum().item() == pytest.approx(1)
    assert torch.equal(kernel, torch.rot90(kernel))
    # As wide as it is called: half of the weight is left at the radius, next to none beyond.
    middle = kernel[radius]
    assert middle[-1].item() == pytest.approx(middle[radius].item() / 2)
    assert (middle[1:-1] == middle[radius]).all()
    area = 1 / middle[radius].item()  # in pixels of full weight
    assert area == pytest.approx(torch.pi * radius**2, rel=0.08)


def test_defocus_blurs_every_channel_alike() -> None:
    image = torch.zeros(3, 15, 15)
    image[:, 7, 7] = torch.tensor([1.0, 10.0, 100.0])
    with seeded(0):
        result = Defocus(2, 2)(image)
    for channel, value in enumerate((1.0, 10.0, 100.0)):
        expected = torch.zeros(15, 15)
        expected[5:10, 5:10] = value * disk(2)
        torch.testing.assert_close(result[channel], expected)
    torch.testing.assert_close(
        Defocus(1, 3)(torch.full((2, 5, 5), 7.0)), torch.full((2, 5, 5), 7.0)
    )


def test_defocus_draws_the_radius() -> None:
    image = torch.zeros(1, 15, 15)
    image[0, 7, 7] = 1
    with seeded(0):
        widths = Counter(int(Defocus(1, 3)(image)[0, 7].count_nonzero()) for _ in range(300))
    assert set(widths) == {3, 5, 7}
    assert min(widths.values()) > 75


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


def test_dropout_draws_the_number_of_holes() -> None:
    # Holes of one pixel in an image so large that two of them hardly ever coincide.
    with seeded(0):
        counts = Counter(
            int((CoarseDropout(10, 1)(torch.ones(1, 500, 500)) == 0).sum()) for _ in range(200)
        )
    assert set(counts) == set(range(1, 11))


@pytest.mark.parametrize("step", ["defocus", "dropout"])
def test_probabilities(step: str) -> None:
    image = noise(2, 16, 16)
    transform = training_transform(16, *plain(2), **{**STILL, step: 0.3})
    orientations = [image, image.flip(1), image.flip(2)]
    orientations += [torch.rot90(image, k, (1, 2)) for k in (1, 2, 3)]
    with seeded(0):
        changed = 0
        for _ in range(500):
            result = transform(image)
            changed += not any(torch.equal(result, other) for other in orientations)
            # Holes are as in the stored values; a disk never reaches 0.
            assert bool((result == 0).any()) <= (step == "dropout")
    assert 0.24 < changed / 500 < 0.36


def test_holes_are_stored_zeros() -> None:
    transform = training_transform(10, (3.0,), (2.0,), defocus=0, dropout=1.0)
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
        ((0, (0.0,), (1.0,)), "img_size 0: expected a height and a width of 1 or more"),
        (((16, 0), (0.0,), (1.0,)), r"img_size \(16, 0\): expected a height and a width"),
        (((16, 16, 3), (0.0,), (1.0,)), r"img_size \(16, 16, 3\): expected a height"),
        ((16, (0.0, 0.0), (1.0, 0.0)), r"std \[1.0, 0.0\]: expected values above 0, got 0.0"),
        ((16, (0.0,), (float("nan"),)), "std .*: expected values above 0, got nan"),
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
        ({"defocus": 1.5}, "defocus 1.5: expected a probability in 0..1"),
        ({"dropout": -0.1}, "dropout -0.1: expected a probability in 0..1"),
        ({"dropout": float("nan")}, "dropout nan: expected a probability in 0..1"),
        ({"defocus_radius": (3, 1)}, r"defocus_radius \[3, 1\]: expected two numbers of 1"),
        ({"defocus_radius": (0, 1)}, r"defocus_radius \[0, 1\]: expected two numbers of 1"),
        ({"dropout_holes": 0}, "dropout_holes 0: expected 1 or more"),
        ({"dropout_size": 0}, "dropout_size 0: expected 1 or more"),
        ({"dropout_size": 17}, "dropout_size 17: expected at most img_size 16"),
    ],
)
def test_mistakes_in_augmentation(settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}"):
        training_transform((16, 20), *plain(1), **settings)
