"""Training images of ADE20K and COCO, changed as the published pipelines change them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from fastvim.data import colours
from fastvim.data.jitter import Change, LargeScaleJitter
from fastvim.data.segmentation import TrainingTransform
from fastvim.data.transforms import training_transform
from fastvim.labels import IGNORE_INDEX

GOLDEN = Path(__file__).parents[1] / "golden" / "training"
ARRAYS = np.load(GOLDEN / "pipelines.npz")
GEOMETRY = json.loads((GOLDEN / "geometry.json").read_text())
PAD = 114  # of 255, where a detector's image ends


def arrays(case: str) -> dict[str, np.ndarray]:
    return {n.partition("/")[2]: ARRAYS[n] for n in ARRAYS.files if n.startswith(f"{case}/")}


def change_of(jitter: LargeScaleJitter, stored, draws) -> Change:
    """The change that a case drew, with the size that the jitter makes of its factor."""
    size = jitter.resized(stored, draws["factor"])
    assert list(size[::-1]) == draws["resized_height_width"]
    width, height = (min(side, jitter.img_size) for side in size)
    assert [height, width] == draws["crop_height_width"]
    top, left = draws["offset_row_column"]
    return Change(draws["flipped"], size, (left, top, left + width, top + height))


@pytest.mark.parametrize("case", ["coco_enlarged", "coco_reduced", "coco_small"])
def test_jitter(case):
    golden = arrays(case)
    draws = json.loads(str(golden["draws"]))
    jitter = LargeScaleJitter(draws["side"], (0.1, 2.0), 0.5, antialias=False)
    image = Image.fromarray(golden["image_rgb"])
    changed = jitter.apply(
        change_of(jitter, image.size, draws),
        image,
        torch.from_numpy(golden["boxes"]),
        golden["masks"].transpose(1, 2, 0),
    )
    pixels, boxes, masks, kept = changed
    height, width = draws["crop_height_width"]
    whole = np.full((draws["side"], draws["side"], 3), PAD, dtype=np.uint8)
    whole[:height, :width] = (pixels * 255).round().byte().permute(1, 2, 0)
    assert np.array_equal(whole, golden["out_image_rgb"])
    padded = np.zeros(golden["out_masks"].shape, dtype=np.uint8)
    padded[:, :height, :width] = masks
    assert np.array_equal(padded, golden["out_masks"])
    assert np.array_equal(boxes, golden["out_boxes"])
    assert kept.tolist() == draws["kept"]


@pytest.mark.parametrize("case", range(len(GEOMETRY["coco"])))
def test_geometry_of_the_jitter(case):
    draws = GEOMETRY["coco"][case]
    height, width = draws["height_width"]
    jitter = LargeScaleJitter(1024, (0.1, 2.0), 0.5, antialias=False)
    change = change_of(jitter, (width, height), draws)
    # Masks that fill their boxes, as the examples have them.
    boxes = torch.tensor(draws["boxes_before"])
    masks = np.zeros((height, width, len(boxes)), dtype=np.uint8)
    for index, (x1, y1, x2, y2) in enumerate(boxes.round().int().tolist()):
        masks[y1:y2, x1:x2, index] = 1
    _, found, _, kept = jitter.apply(change, Image.new("RGB", (width, height)), boxes, masks)
    assert kept.tolist() == draws["kept"]
    assert found.tolist() == draws["boxes"]


def segmentation(side: int) -> TrainingTransform:
    return TrainingTransform(
        img_size=(side, side),
        base_size=(4 * side, side),
        ratio=(0.5, 2.0),
        max_share=0.75,
        hflip=0.5,
        distortion=0.5,
        mean=IMAGENET_DEFAULT_MEAN,
        std=IMAGENET_DEFAULT_STD,
        antialias=False,
    )


def window_of(transform: TrainingTransform, stored, draws):
    """Size and window of a case: the window as drawn, cut at the image's edge."""
    size = transform.resized(stored, draws["factor"])
    assert list(size[::-1]) == draws["resized_height_width"]
    top, bottom, left, right = draws["crop_top_bottom_left_right"]
    window = (left, top, min(right, size[0]), min(bottom, size[1]))
    assert [window[3] - window[1], window[2] - window[0]] == draws["crop_height_width"]
    return size, window


@pytest.mark.parametrize("case", ["ade20k_reduced", "ade20k_enlarged"])
def test_segmentation(case):
    golden = arrays(case)
    draws = json.loads(str(golden["draws"]))
    transform = segmentation(draws["side"])
    image = Image.fromarray(golden["image_rgb"])
    size, window = window_of(transform, image.size, draws)
    pixels, classes = transform.cut(image, golden["labels"], size, window, draws["flipped"])
    assert np.array_equal(pixels, golden["out_image_rgb"])
    tensor, labels = transform.finish(pixels, classes)
    assert np.array_equal(labels, golden["out_labels"])
    torch.testing.assert_close(tensor, torch.from_numpy(golden["out_tensor"]), rtol=0, atol=1e-6)
    assert (tensor[:, labels == IGNORE_INDEX] == 0).any() == (case == "ade20k_reduced")


@pytest.mark.parametrize("draws", GEOMETRY["ade20k"])
def test_geometry_of_segmentation(draws):
    height, width = draws["height_width"]
    window_of(segmentation(512), (width, height), draws)


def test_crops_without_two_classes_are_drawn_again():
    """The tenth redraw is taken as it is."""
    transform = segmentation(32)
    mask = np.zeros((256, 256), dtype=np.uint8)
    mask[96:160, 96:160] = 1
    torch.manual_seed(0)
    crops = [mask[y:b, x:r] for x, y, r, b in (transform._crop(mask) for _ in range(500))]
    mixed = [len(np.unique(crop)) == 2 for crop in crops]
    # A crop that is drawn once shows both classes with this probability.
    once = np.mean(
        [
            (share := mask[y : y + 32, x : x + 32].mean()) > 0 and max(share, 1 - share) < 0.75
            for y in range(0, 225, 4)
            for x in range(0, 225, 4)
        ]
    )
    assert np.mean(mixed) == pytest.approx(1 - (1 - once) ** 11, abs=4 * 0.5 / 500**0.5)


COLOURS = {
    "brightness": lambda image, value: colours.linear(image, bias=value),
    "contrast": colours.linear,
    "saturation": colours.saturate,
    "hue": lambda image, value: colours.turn_hue(image, int(value)),
}


@pytest.mark.parametrize("name", COLOURS)
def test_colours(name):
    golden = arrays("ade20k_colour")
    found = COLOURS[name](golden["image_rgb"], float(golden[f"{name}_value"]))
    assert np.array_equal(found, golden[f"{name}_rgb"])


def test_colours_of_every_pixel_come_back():
    """To hue, saturation and value and back: 8 bits lose at most a few steps."""
    torch.manual_seed(0)
    image = torch.randint(256, (200, 200, 3)).byte().numpy()
    again = colours.to_rgb(*colours.to_hsv(image))
    assert np.abs(again.astype(int) - image).max() <= 6


@pytest.mark.parametrize("draws", GEOMETRY["imagenet_crop"])
def test_random_resized_crop(monkeypatch, draws):
    """The share of the area, then the logarithm of the aspect, pair by pair until one fits."""
    (crop,) = [
        step
        for step in training_transform(scale=tuple(draws["scale"])).pixels.transforms
        if hasattr(step, "get_params")
    ]
    drawn = iter(draws["drawn"])
    places = iter([draws["top"], draws["left"]])
    monkeypatch.setattr("random.uniform", lambda low, high: next(drawn))
    monkeypatch.setattr("random.randint", lambda low, high: next(places))
    image = Image.new("RGB", tuple(draws["width_height"]))
    found = crop.get_params(image, crop.scale, crop.ratio)
    assert list(found) == [draws[name] for name in ("top", "left", "height", "width")]
    assert next(drawn, None) is None
