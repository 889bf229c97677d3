"""timm's transforms with our defaults and checks."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.auto_augment import rand_augment_transform
from torchvision.transforms import functional as F

from fastvim.data.sampler import seeded
from fastvim.data.steps import in_fewer_calls
from fastvim.data.transforms import evaluation_transform, training_transform
from fastvim.errors import UserError

NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, size=(40, 30, 3), dtype=np.uint8))


def test_evaluation_resizes_crops_and_normalises() -> None:
    result = evaluation_transform(img_size=14, mean=(0.5,), std=(0.25, 0.5, 1.0))(NOISE)
    resized = F.resize(NOISE, 16, interpolation=F.InterpolationMode.BICUBIC)  # 14 / 0.875
    expected = F.to_tensor(F.center_crop(resized, 14))
    expected = (expected - 0.5) / torch.tensor([0.25, 0.5, 1.0])[:, None, None]
    torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("make", [evaluation_transform, training_transform])
@pytest.mark.parametrize(("in_chans", "mean"), [(1, (0.5,)), (3, (0.5, 0.5, 0.5))])
@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "I;16"])
def test_any_image_becomes_a_tensor(make, in_chans: int, mean: tuple, mode: str) -> None:
    image = NOISE.convert("I").convert(mode) if mode == "I;16" else NOISE.convert(mode)
    transform = pickle.loads(pickle.dumps(make((8, 12), mean, mean, in_chans=in_chans)))
    result = transform(image)
    assert result.shape == (in_chans, 8, 12)
    assert result.dtype == torch.float32
    assert result.isfinite().all()


@pytest.mark.parametrize("policy", ["rand-m10-n5-inc1", "v0", "augmix-m10-w3"])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_augmentation_survives_posterisation_to_nothing(policy: str, mode: str) -> None:
    # At magnitude 10 every posterisation of RandAugment keeps 0 bits.
    in_chans = len(mode)
    transform = training_transform(
        8, (0.5,), (0.5,), in_chans=in_chans, auto_augment=policy, re_prob=0
    )
    with seeded(0):
        results = torch.stack([transform(NOISE) for _ in range(100)])
    assert results.isfinite().all()


@pytest.mark.parametrize("policy", ["rand-m9-mstd0.5-inc1", "rand-m9-n4-p0.3", "rand-m7-t3aw"])
def test_augmentation_draws_what_timm_draws(policy: str) -> None:
    theirs = rand_augment_transform(policy, {"translate_const": 4})
    ours = in_fewer_calls(theirs)
    assert type(ours) is not type(theirs)
    found = []
    for step in (theirs, ours):
        with seeded(3):
            images = [np.asarray(step(NOISE)) for _ in range(20)]
            found.append([*images, np.random.random()])
    for one, other in zip(*found, strict=True):
        np.testing.assert_array_equal(one, other)


def test_augmentation_may_be_turned_off() -> None:
    still = {"scale": (1.0, 1.0), "ratio": (0.75, 0.75), "hflip": 0.0, "re_prob": 0.0}
    transform = training_transform((40, 30), auto_augment=None, **still)
    assert torch.equal(transform(NOISE), evaluation_transform((40, 30), crop_pct=1.0)(NOISE))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"in_chans": 4}, "in_chans 4: expected 1 .grey. or 3"),
        ({"in_chans": 1}, "mean .*: expected 1 value or 1, one a channel"),
        ({"std": (1.0, 1.0)}, "std .*: expected 1 value or 3, one a channel"),
        ({"interpolation": "bicubik"}, r"interpolation 'bicubik': .* \(nearest: bicubic"),
        ({"crop_pct": 0.0}, "crop_pct 0.0: expected more than 0"),
        ({"auto_augment": "rnd-m9"}, "auto_augment 'rnd-m9': expected a policy of timm"),
        ({"re_mode": "noise"}, "re_mode 'noise': expected one of 'const', 'rand', 'pixel'"),
    ],
)
def test_mistakes(settings: dict, message: str) -> None:
    make = evaluation_transform if "crop_pct" in settings else training_transform
    with pytest.raises(UserError, match=message):
        make(**settings)
