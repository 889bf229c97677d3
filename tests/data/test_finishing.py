"""Pixels from the loading processes and whole batches finished, beside timm's steps one by one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from timm.data.random_erasing import RandomErasing
from torch.utils.data import default_collate
from torchvision.transforms import Compose, Normalize, ToTensor

from fastvim.data.finishing import CPU, DrawErasing, Drawn, Finish
from fastvim.data.sampler import seeded
from fastvim.data.transforms import evaluation_transform, training_transform

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DEVICES = [CPU, pytest.param(torch.device("cuda"), marks=pytest.mark.gpu)]
EVERY_VALUE = torch.arange(256, dtype=torch.uint8).view(16, 16).expand(3, 16, 16).contiguous()


def picture(seed: int, high: int = 61, wide: int = 80) -> Image.Image:
    """Smooth colours with noise on them."""
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 256, (5, 6, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((wide, high)), dtype=int)
    noisy = smooth + generator.integers(-20, 20, smooth.shape)
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def one_by_one(**settings) -> Compose:
    """timm's transform that normalises and erases every image for itself."""
    common = {"mean": MEAN, "std": STD, "interpolation": "bicubic"}
    return create_transform(**{**common, **settings})


@pytest.mark.parametrize(
    "settings", [{}, {"auto_augment": None, "color_jitter": 0.4}, {"auto_augment": "augmix-m5-w2"}]
)
def test_training_images_are_those_of_timm(settings: dict) -> None:
    drawn = {"auto_augment": "rand-m9-mstd0.5-inc1", "color_jitter": 0.0, **settings}
    drawn |= {"scale": (0.08, 1.0), "ratio": (3 / 4, 4 / 3), "re_prob": 0.5}
    theirs = one_by_one(input_size=32, is_training=True, re_mode="const", **drawn)
    ours = training_transform(32, MEAN, STD, re_mode="const", **drawn)
    for seed in range(60):
        with seeded(seed):
            expected = theirs(picture(seed))
        with seeded(seed):
            assert torch.equal(ours(picture(seed)), expected)


def test_a_batch_of_pixels_is_finished_as_its_images_are() -> None:
    transform = training_transform(32, MEAN, STD, re_prob=0.5)
    images, drawn = [], []
    for seed in range(16):
        for samples, make in ((images, transform), (drawn, transform.pixels)):
            with seeded(seed):
                samples.append(make(picture(seed)))
    batch = default_collate(drawn)
    assert batch.pixels.dtype == torch.uint8
    assert batch.pixels[0].is_contiguous()
    torch.testing.assert_close(transform.finish(batch), torch.stack(images), rtol=0, atol=0)


def test_evaluation_has_the_pixels_of_timm() -> None:
    theirs = one_by_one(input_size=(24, 40), is_training=False, crop_pct=0.9)
    ours = evaluation_transform((24, 40), MEAN, STD, crop_pct=0.9)
    for seed in range(4):
        assert torch.equal(ours(picture(seed)), theirs(picture(seed)))


@pytest.mark.parametrize("device", DEVICES)
def test_every_value_is_normalised_bit_for_bit(device: torch.device) -> None:
    image = Image.fromarray(EVERY_VALUE.permute(1, 2, 0).numpy())
    for mean, std in ((MEAN, STD), ((0.5,) * 3, (0.5,) * 3), ((0.1, 0.7, 0.9), (0.3, 1.7, 0.07))):
        expected = Normalize(mean, std)(ToTensor()(image))
        found = Finish(mean, std)(EVERY_VALUE[None], device)
        assert found.device.type == device.type
        assert torch.equal(found.cpu()[0], expected)


@pytest.mark.parametrize("size", [(224, 224), (16, 40), (5, 3)])
def test_rectangles_are_those_of_timm(size: tuple[int, int]) -> None:
    """For the same state of the generator: so are their shares, aspects, places and attempts."""
    theirs = RandomErasing(0.6, mode="const", device="cpu")
    ours = DrawErasing(0.6)
    count = 0
    for seed in range(300):
        with seeded(seed):
            expected = theirs(torch.ones(1, *size))
        with seeded(seed):
            top, left, height, width, fill = ours(torch.ones(1, *size)).erased.tolist()
        found = torch.ones(1, *size)
        found[:, top : top + height, left : left + width] = 0
        assert torch.equal(found, expected)
        assert fill or not height
        count += bool(fill)
    assert 130 < count < 230


def noise(fill: str, seeds: list[int], device: torch.device) -> torch.Tensor:
    """What fills the same rectangle of grey images, (B, 3, 20, 30); nothing else may change."""
    pixels = torch.full((len(seeds), 3, 40, 40), 128, dtype=torch.uint8)
    erased = torch.tensor([[8, 5, 20, 30, seed] for seed in seeds])
    finish = Finish(MEAN, STD, fill)
    images = finish(Drawn(pixels, erased), device).cpu()
    part = images[..., 8:28, 5:35].clone()
    images[..., 8:28, 5:35] = finish(pixels)[..., 8:28, 5:35]
    assert torch.equal(images, finish(pixels))
    return part


@pytest.mark.parametrize("device", DEVICES)
def test_what_fills_a_rectangle(device: torch.device) -> None:
    seeds = [*range(1, 100), 2**63 - 1]
    assert not noise("const", seeds, device).any()
    every = noise("pixel", seeds, device)  # 180,000 values
    assert abs(every.mean()) < 0.01
    assert abs(every.std() - 1) < 0.01
    assert abs((every.abs() < 1).float().mean() - 0.6827) < 0.005
    assert len(every.unique()) > 0.95 * every.numel()
    colours = noise("rand", seeds, device)
    assert torch.equal(colours, colours[..., :1, :1].expand_as(colours))
    assert abs(colours[..., 0, 0].std() - 1) < 0.2
    # It is the image's own, in any batch.
    assert torch.equal(noise("pixel", seeds[7:9], device), every[7:9])
