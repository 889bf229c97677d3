"""What is done to whole batches, beside Pillow and timm; the kernels beside their definitions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import auto_augment as timms

from fastvim.data.finishing import CPU, Drawn, Finish, _of_every_value
from fastvim.data.gpu.augment import augment
from fastvim.data.gpu.crops import BITS, FILTERS, Windows, _resize_on_gpu, crop_and_resize
from fastvim.data.gpu.planned import _NOTED, KINDS, Planned, numbered
from fastvim.data.sampler import seeded
from fastvim.data.transforms import training_transform

pytestmark = pytest.mark.usefixtures("quick_interpreter")
HIGH, WIDE = 48, 61
CUDA = torch.device("cuda")
DEVICES = [CPU, pytest.param(CUDA, marks=pytest.mark.gpu)]
KERNELS = CUDA if torch.cuda.is_available() else CPU  # else in the interpreter
STRENGTHS = (0.1, 0.37, 1.0, 1.46, 1.9)
ENHANCED = (timms.brightness, timms.contrast, timms.color, timms.sharpness)
MOVED = (timms.shear_x, timms.shear_y, timms.translate_x_rel, timms.translate_y_rel)
COLOURS: list[tuple[Callable[..., Any], tuple[float, ...]]] = [
    *((timms.auto_contrast, ()), (timms.equalize, ()), (timms.invert, ())),
    *((timms.posterize, (bits,)) for bits in (1, 4, 8)),
    *((timms.solarize, (limit,)) for limit in (0, 100, 256)),
    *((timms.solarize_add, (added,)) for added in (0, 55, 110)),
    *((step, (strength,)) for step in ENHANCED for strength in STRENGTHS),
    (timms.desaturate, (0.3,)),
]
AFFINE = [
    *((step, (amount,)) for step in MOVED for amount in (0.3, -0.137)),
    *((timms.rotate, (angle,)) for angle in (30.0, -11.3, 0.0)),
    *(
        (step, (pixels,))
        for step in (timms.translate_x_abs, timms.translate_y_abs)
        for pixels in (7,)
    ),
]
FLIPS = (Image.Transpose.FLIP_TOP_BOTTOM, Image.Transpose.FLIP_LEFT_RIGHT)
WAYS = (Image.Resampling.BICUBIC, Image.Resampling.BILINEAR)


def pictures() -> list[np.ndarray]:
    """Noise, edges, one colour, and what is smooth but dark."""
    generator = np.random.default_rng(0)
    y, x = np.mgrid[:HIGH, :WIDE]
    noise = generator.integers(0, 256, (HIGH, WIDE, 3))
    edges = np.stack([x * 4 + y, 255 - x * 3 + y, 40 + x * y % 97], 2)
    waves = 60 + 30 * np.sin(x / 7)[..., None] * np.cos(y / 9)[..., None] * np.array([1, 0.5, -1])
    every = (noise, edges, np.full((HIGH, WIDE, 3), 77), waves)
    return [np.clip(each, 0, 255).astype(np.uint8) for each in every]


def batch(images: list[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()


def noted(step: Callable[..., Any], values: tuple[float, ...], how: dict[str, Any]) -> np.ndarray:
    picture = _NOTED[step](Planned((WIDE, HIGH)), *values, **how)
    return numbered([picture.operations] * len(pictures()))


def by_pillow(step: Callable[..., Any], values: tuple[float, ...], how: dict) -> torch.Tensor:
    done = (step(Image.fromarray(each), *values, **dict(how)) for each in pictures())
    return batch([np.array(each) for each in done])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("way", WAYS)
def test_operations_are_those_of_pillow(way: Image.Resampling, device: torch.device) -> None:
    how = {"fillcolor": (124, 116, 104), "resample": way}
    images = batch(pictures()).to(device)
    kinds = set()
    for step, values in (*COLOURS, *AFFINE):
        operations = noted(step, values, how)
        kinds |= {KINDS[int(number)] for number in operations[:, 0, 0]}
        found = augment(images, operations).cpu()
        assert torch.equal(found, by_pillow(step, values, how)), (step.__name__, values)
    assert kinds == set(KINDS)


def test_no_policy_of_the_recipes_is_left_out() -> None:
    for policy in ("rand-m9-mstd0.5-inc1", "rand-m7-n4", "original", "v0"):
        transform = training_transform(32, auto_augment=policy)
        assert type(transform.pixels.transforms[2]).__name__ in ("FewOf", "AutoAugment")  # type: ignore[attr-defined]


def test_several_operations_follow_each_other() -> None:
    picture = Planned((WIDE, HIGH))
    how = {"fillcolor": (1, 2, 3), "resample": Image.Resampling.BICUBIC}
    expected = Image.fromarray(pictures()[0])
    for step, values in ((timms.rotate, (20.0,)), (timms.equalize, ()), (timms.color, (0.4,))):
        _NOTED[step](picture, *values, **how)
        expected = step(expected, *values, **dict(how))
    operations = numbered([picture.operations, []])
    found = augment(batch(pictures()[:1] * 2), operations)
    assert torch.equal(found[0], batch([np.array(expected)])[0])
    assert torch.equal(found[1], batch(pictures()[:1])[0])  # the second has none


def test_kernels_of_augmentation_do_as_defined() -> None:
    from fastvim.data.gpu import augment as module

    planned = []
    for step, values in (*COLOURS[::4], *AFFINE[::5], *COLOURS[-2:]):
        picture = Planned((WIDE, HIGH))
        for way in WAYS:
            _NOTED[step](picture, *values, fillcolor=(9, 99, 200), resample=way)
        planned.append(picture.operations)
    images = batch(pictures())[:2].repeat(len(planned) // 2 + 1, 1, 1, 1)[: len(planned)]
    operations = numbered(planned)
    found = module._by_kernels(images.to(KERNELS), torch.from_numpy(operations))
    assert torch.equal(found.cpu(), augment(images, operations))


def windows(seed: int, size: tuple[int, int], count: int = 3) -> Windows:
    generator = np.random.default_rng(seed)
    images, boxes = [], []
    for _ in range(count):
        high, wide = (int(each) for each in generator.integers(5, 150, 2))
        height, width = int(generator.integers(1, high + 1)), int(generator.integers(1, wide + 1))
        top, left = (
            generator.integers(0, high - height + 1),
            generator.integers(0, wide - width + 1),
        )
        values = generator.integers(0, 256, (high, wide, 3), dtype=np.uint8)
        images.append(values)
        boxes.append((top, left, height, width))
    mirrored = generator.integers(0, 2, (count, 2)) > 0
    more = generator.integers(0, 40, (count, 2)) * generator.integers(0, 2, (count, 1))
    begin = generator.integers(0, more + 1)
    sizes = np.array([image.shape[:2] for image in images])
    begins = sizes.prod(1).cumsum() * 3 - sizes.prod(1) * 3
    pixels = torch.from_numpy(np.concatenate([image.ravel() for image in images]))
    turned = np.zeros(count, dtype=bool)
    boxes = np.array(boxes)
    return Windows(pixels, begins, sizes, turned, boxes, size + more, begin, mirrored)


@pytest.mark.parametrize("interpolation", [*FILTERS, "nearest"])
def test_crops_are_those_of_pillow(interpolation: str) -> None:
    way = Image.Resampling[interpolation.upper()]
    for seed in range(6):
        given = windows(seed, (48, 64))
        if interpolation == "nearest":  # where Pillow adds up steps, and rounds each sum
            given = given._replace(whole=given.whole * 0 + (48, 64), begin=given.begin * 0)
        found = crop_and_resize(given, (48, 64), interpolation, CPU)
        for number, (box, whole, begin, mirrored, one) in enumerate(
            zip(*given[4:], found, strict=True)
        ):
            top, left, height, width = (int(each) for each in box)
            picture = Image.fromarray(given.image(number).permute(1, 2, 0).numpy())
            picture = picture.crop((left, top, left + width, top + height))
            # One axis at a time: Pillow itself would begin with the cheaper one.
            high, wide = (int(each) for each in whole)
            picture = picture.resize((wide, height), way).resize((wide, high), way)
            for flip, way_of in zip(
                mirrored, (Image.Transpose(1), Image.Transpose(0)), strict=True
            ):
                picture = picture.transpose(way_of) if flip else picture
            top, left = (int(each) for each in begin)
            picture = picture.crop((left, top, left + 64, top + 48))
            apart = (batch([np.array(picture)])[0].int() - one.int()).abs()
            assert apart.max() <= (1 if interpolation == "hamming" else 0)
            assert (apart > 0).sum() <= 4


@pytest.mark.parametrize("interpolation", [*FILTERS, "nearest"])
def test_kernels_of_crops_do_as_defined(interpolation: str) -> None:
    given = windows(8, (20, 13), 2)
    assert (given.begin > 0).any()
    given = given._replace(turned=np.array([True, False]))
    given = given._replace(boxes=np.concatenate((given.boxes[:1, [1, 0, 3, 2]], given.boxes[1:])))
    there = given._replace(pixels=given.pixels.to(KERNELS))
    found = _resize_on_gpu(there, (20, 13), interpolation, KERNELS)
    assert torch.equal(found.cpu(), crop_and_resize(given, (20, 13), interpolation, CPU))
    assert BITS == 22  # Pillow's


@pytest.mark.parametrize("fill", ["const", "rand", "pixel"])
def test_the_kernel_erases_rectangles(fill: str) -> None:
    from fastvim.data.gpu.kernels.finish import finish

    pixels = torch.zeros((3, 3, 40, 50), dtype=torch.uint8, device=KERNELS)
    values = torch.full((3, 256), 9.0, device=KERNELS)
    rectangles = torch.tensor([[2, 3, 30, 35, 2**62 + 5], [0, 0, 0, 0, 0], [35, 49, 5, 1, 9]])
    images = finish(pixels, values, rectangles, fill)
    again = finish(pixels[2:], values, rectangles[2:], fill)
    assert torch.equal(again[0], images[2])  # whatever else is in the batch
    part = images[0, :, 2:32, 3:38].cpu()
    assert (images.cpu() != 9).sum((1, 2, 3)).tolist() == [3 * 30 * 35, 0, 15]
    if fill == "pixel":
        assert abs(part.mean()) < 0.1
        assert abs(part.std() - 1) < 0.1
        assert abs(float((part.abs() < 1).float().mean()) - 0.683) < 0.03
    else:
        assert (part == part[:, :1, :1]).all()
        assert (part == 0).all() == (fill == "const")


@pytest.mark.parametrize("channels", [1, 3])
def test_the_kernel_normalises_as_the_cpu_does(channels: int) -> None:
    from fastvim.data.gpu.kernels.finish import finish

    mean, std = (0.485, 0.456, 0.1)[:channels], (0.229, 1.7, 0.07)[:channels]
    shape = 2, channels, 33, 40
    pixels = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(3)).byte()
    values = _of_every_value(mean, std, KERNELS)
    found = finish(pixels.to(KERNELS), values, None, "const")
    assert torch.equal(found.cpu(), Finish(mean, std)(pixels))


@pytest.mark.gpu
def test_a_gpu_finishes_batches_with_the_kernel() -> None:
    finish = Finish((0.5,) * 3, (0.5,) * 3, "const")
    pixels = torch.full((2, 3, 8, 8), 255, dtype=torch.uint8)
    erased = torch.tensor([[1, 1, 2, 3, 0], [0, 0, 0, 0, 0]])
    assert torch.equal(finish(Drawn(pixels, erased), CUDA).cpu(), finish(Drawn(pixels, erased)))


def test_the_same_numbers_are_drawn() -> None:
    from fastvim.data.gpu.planned import planned

    transform = training_transform(32, re_prob=0.5)
    steps = planned(transform.pixels)
    assert steps is not None
    for seed in range(40):
        with seeded(seed):
            drawn = transform.pixels(Image.fromarray(pictures()[0]))
            after = torch.rand(1), np.random.rand()
        with seeded(seed):
            picture = steps(Planned((WIDE, HIGH)))
            assert (torch.rand(1), np.random.rand()) == after
        assert torch.equal(picture.erased, drawn.erased)  # type: ignore[union-attr]


@pytest.mark.parametrize("policy", ["augmix-m5-w2", "3a"])
def test_what_batches_cannot_be_given_is_not_planned(policy: str) -> None:
    from fastvim.data.gpu.planned import planned

    assert planned(training_transform(32, auto_augment=policy).pixels) is None


@pytest.mark.parametrize("interpolation", ["nearest", "lanczos"])
def test_what_pillow_does_otherwise_is_not_planned(interpolation: str) -> None:
    from fastvim.data.gpu.planned import planned

    assert planned(training_transform(32, interpolation=interpolation).pixels) is None
    settings = {"interpolation": interpolation, "auto_augment": ""}
    assert planned(training_transform(32, **settings).pixels) is not None  # type: ignore[arg-type]
