"""Cells are augmented and split as published: equal shares of draws, responses and rows."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from channel_images import STILL, noise, orientations, plain

from fastvim.data.channel_transforms import Defocus, Pad, disk, training_transform
from fastvim.data.sampler import seeded
from fastvim.data.table import random_splits

FILE = Path(__file__).parents[1] / "golden" / "training" / "cells.json"
PUBLISHED = json.loads(FILE.read_text())


def assert_same_shares(
    ours: Mapping[str, int], theirs: Mapping[str, int], draws: int, their_draws: int
) -> None:
    """Each count of `draws` within four standard errors of the published count of theirs."""
    for name, count in theirs.items():
        share = count / their_draws
        error = math.sqrt(share * (1 - share) * (1 / draws + 1 / their_draws))
        assert abs(ours[name] / draws - share) < 4 * error, name


def test_the_published_padding_and_crop() -> None:
    """An image of 224 pixels goes to one of 33 x 33 places in 256; so does the crop."""
    theirs = PUBLISHED["padding"]
    image = torch.zeros(1, 224, 224, dtype=torch.uint8)
    image[0, 0, 0] = 1
    pad = Pad(256, 256, random=True)
    with seeded(0):
        draws = [pad(image)[0].nonzero()[0].tolist() for _ in range(theirs["draws"])]
    places = Counter(map(tuple, draws))
    assert {min(place) for place in places} | {max(place) for place in places} <= set(range(33))
    for axis in (0, 1):  # uniform: mean 16, deviation 9.52
        counts = torch.bincount(torch.tensor(draws)[:, axis], minlength=33)
        assert (counts - theirs["draws"] / 33).abs().max() < 4 * math.sqrt(theirs["draws"] / 33)
    # How many of n places are seen has a deviation of about sqrt(n e^-r (1 - (1 + r) e^-r)) for
    # r draws a place: 6.6 here, so 9.3 for the difference of two.
    assert abs(len(places) - theirs["distinct_places"]) < 4 * 9.3

    rows = torch.ones(1, 224, 224, dtype=torch.uint8)
    transform = training_transform(224, *plain(1), min_size=256, **STILL)
    published = PUBLISHED["rows_shown_of_224_after_pad_and_crop"]
    with seeded(1):
        shown = [int(transform(rows)[0].amax(1).sum()) for _ in range(theirs["draws"])]
    deviation = float(np.std(shown)) * math.sqrt(2 / theirs["draws"])
    assert abs(np.mean(shown) - published["mean"]) < 4 * deviation
    ours = {"all": shown.count(224)}
    assert_same_shares(ours, {"all": published["all"]}, theirs["draws"], theirs["draws"])


def test_the_published_orientations() -> None:
    theirs = PUBLISHED["orientation_of_20000"]
    rotated = theirs["other rotation"] + theirs["exact quarter turn"]
    theirs = {name: theirs[name] for name in ("same", "horizontal", "vertical")}
    image = noise(1, 12, 12).to(torch.uint8)
    transform = training_transform(12, *plain(1), defocus=0.0, dropout=0.0)
    known = {o.float().numpy().tobytes(): name for name, o in orientations(image).items()}
    with seeded(0):
        results = [transform(image).numpy().tobytes() for _ in range(10_000)]
    seen = Counter(known.get(result, "rotated") for result in results)
    seen["rotated"] += sum(count for name, count in seen.items() if name.startswith("by "))
    assert_same_shares(seen, {**theirs, "rotated": rotated}, 10_000, 20_000)


@pytest.mark.parametrize("radius", [1, 2, 3])
def test_the_published_disk(radius: int) -> None:
    kernel = disk(radius, 0.3)
    assert kernel.shape == (2 * radius + 3, 2 * radius + 3)
    assert kernel.sum().item() == pytest.approx(1)
    torch.testing.assert_close(kernel, kernel.rot90())
    reach = radius + 1
    response = PUBLISHED["defocus"][f"response_radius{radius}_alias0.3_centre_row_offsets_-5_to_5"]
    # Published to five digits after the point, of whole numbers divided.
    padded = torch.nn.functional.pad(kernel[reach], (5 - reach, 5 - reach))
    np.testing.assert_allclose(padded.numpy(), response, rtol=0, atol=1.1e-5)
    # Even: with no smoothing to speak of, every cell of the disk weighs the same.
    cells = {1: 5, 2: 13, 3: 29}[radius]
    sharp = disk(radius, 0.1)
    assert torch.equal(sharp > 1e-6, sharp.isclose(torch.tensor(1 / cells), rtol=1e-5))
    assert (sharp > 1e-6).sum() == cells


def test_the_published_radii() -> None:
    image = torch.zeros(1, 15, 15)
    image[0, 7, 7] = 1
    with seeded(0):
        results = [Defocus()(image)[0, 7] for _ in range(1000)]
    # The disk's own cells weigh more than half of the middle's, those around it far less.
    radii = Counter(str(int((row > row[7] / 2).sum()) // 2) for row in results)
    assert_same_shares(radii, PUBLISHED["defocus"]["radii_of_3000"], 1000, 3000)


def test_the_published_holes() -> None:
    theirs = PUBLISHED["coarse_dropout"]
    transform = training_transform(224, *plain(1), orientation=0.0, defocus=0.0)
    image = torch.ones(1, 224, 224, dtype=torch.uint8)
    with seeded(0):
        zeros = [int((transform(image) == 0).sum()) for _ in range(theirs["images"])]
    cut = [count for count in zeros if count]
    assert_same_shares(
        {"hit": len(cut)}, {"hit": theirs["hit"]}, theirs["images"], theirs["images"]
    )
    error = float(np.std(cut)) * math.sqrt(1 / len(cut) + 1 / theirs["hit"])
    assert abs(np.mean(cut) - theirs["zero_pixels_mean"]) < 4 * error
    assert max(cut) == theirs["zero_pixels_most"] == 1000


def test_the_published_probability_of_a_defocus() -> None:
    image = noise(1, 16, 16)
    transform = training_transform(16, *plain(1), orientation=0.0, dropout=0.0)
    with seeded(0):
        hit = sum(not torch.equal(transform(image), image) for _ in range(1000))
    assert_same_shares({"hit": hit}, {"hit": PUBLISHED["defocus"]["hit_of_2000"]}, 1000, 2000)


@pytest.mark.parametrize("size", [1, 4, 5, 21, 999, 1234])
def test_the_published_split(size: int) -> None:
    np.random.seed(0)
    order = np.random.permutation(size)
    first, second = int(0.6 * size), int(0.6 * size) + int(0.2 * size)
    names = random_splits(size, seed=0)
    assert set(names[order[:first]]) <= {"train"}
    assert set(names[order[first:second]]) <= {"val"}
    assert set(names[order[second:]]) == {"test"}
