"""Masks in the layout of ADE20K."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from fault_sets.drawn import BLOCKS, SIDE, Drawn, fault, named, odd


def write_masks(drawn: Drawn) -> None:
    classes, reduced = int(drawn.rng.integers(2, 5)), drawn.chance()
    for split, number in (("training", 6), ("validation", 3)):
        for kind in ("images", "annotations"):
            (drawn.root / kind / split).mkdir(parents=True)
        for index in range(number):
            image = drawn.noise()
            values = drawn.rng.integers(0, classes, image.shape[:2], dtype=np.uint8) + reduced
            if drawn.chance():
                values[:3] = 255  # does not count
            ending = drawn.rng.choice(["png", "jpg"])
            Image.fromarray(image).save(drawn.root / "images" / split / f"{index}.{ending}")
            write_mask(drawn, split, index, values.astype(np.uint8))
    drawn.data |= {
        "num_classes": classes,
        "reduce_zero_label": reduced,
        "img_size": SIDE,
        "base_size": None,
        "batch_size": 2,
    }
    drawn.task |= {
        "model_args": {**BLOCKS, "norm": "layer"},
        "out_indices": [0, 1],
        "channels": 8,
        "aux_channels": 8,
        "window": None,
    }


def write_mask(drawn: Drawn, split: str, index: int, values: np.ndarray) -> None:
    Image.fromarray(values).save(drawn.root / "annotations" / split / f"{index}.png")


def read_mask(path: Path) -> np.ndarray:
    return np.array(Image.open(path))


def change_masks(
    drawn: Drawn, change: Callable[[np.ndarray], np.ndarray], split: str = "*"
) -> None:
    for path in drawn.root.glob(f"annotations/{split}/*.png"):
        Image.fromarray(change(read_mask(path)).astype(np.uint8)).save(path)


@odd("masks")
def a_mask_of_one_class(drawn: Drawn) -> None:
    path = drawn.pick("annotations/training/*.png")
    Image.fromarray(np.full_like(read_mask(path), drawn.data["reduce_zero_label"])).save(path)


@odd("masks")
def an_empty_mask(drawn: Drawn) -> None:
    path = drawn.pick("annotations/*/*.png")
    Image.fromarray(np.full_like(read_mask(path), 255)).save(path)


@odd("masks")
def one_grey_scene(drawn: Drawn) -> None:
    path = drawn.pick("images/training/*.*")
    Image.open(path).convert("L").save(path)


@odd("masks")
def validation_of_one_class(drawn: Drawn) -> None:
    change_masks(drawn, lambda m: np.full_like(m, drawn.data["reduce_zero_label"]), "validation")


@odd("masks")
def a_mask_in_16_bits(drawn: Drawn) -> None:
    path = drawn.pick("annotations/*/*.png")
    Image.fromarray(read_mask(path).astype(np.uint16)).save(path)


@odd("masks")
def masks_with_a_palette(drawn: Drawn) -> None:
    path = drawn.pick("annotations/training/*.png")
    image = Image.fromarray(read_mask(path))
    image.putpalette([value for index in range(256) for value in (index, 255 - index, 7)])
    image.save(path)


@fault("masks", "stops")
def foreground_as_255(drawn: Drawn) -> str:
    drawn.data |= {"num_classes": 2, "reduce_zero_label": False}
    change_masks(drawn, lambda m: np.where((m > 0) & (m < 255), 255, 0))
    return "one class.*1.*255|without pixels of any class.*255"  # where all was foreground


@fault("masks", "stops")
def two_classes_of_which_0_is_left_out(drawn: Drawn) -> str:
    drawn.data |= {"num_classes": 2, "reduce_zero_label": True}
    change_masks(drawn, lambda m: (m % 2).astype(np.uint8))
    return "one class.*reduce_zero_label"


@fault("masks", "warns")
def class_that_never_occurs(drawn: Drawn) -> str:
    drawn.data["num_classes"] += 1
    return rf"class without pixels.*{drawn.data['num_classes'] - 1}"


@fault("masks", "stops")
def value_beyond_the_classes(drawn: Drawn) -> str:
    path = drawn.pick("annotations/*/*.png")
    values = read_mask(path)
    values[-1, -1] = drawn.data["num_classes"] + drawn.data["reduce_zero_label"]
    Image.fromarray(values).save(path)
    return rf"{named(path)}: value {values[-1, -1]} \(1 pixel\)"


@fault("masks", "stops")
def classes_as_colours(drawn: Drawn) -> str:
    path = drawn.pick("annotations/*/*.png")
    Image.fromarray(read_mask(path)).convert("RGB").save(path)
    return rf"{named(path)}.*(mode RGB|colour)"


@fault("masks", "stops")
def mask_of_another_size(drawn: Drawn) -> str:
    path = drawn.pick("annotations/*/*.png")
    Image.fromarray(read_mask(path)[2:]).save(path)
    return named(path)


@fault("masks", "stops")
def missing_mask(drawn: Drawn) -> str:
    path = drawn.pick("annotations/*/*.png")
    path.unlink()
    return named(path)


@fault("masks", "warns")
def mask_without_a_scene(drawn: Drawn) -> str:
    path = drawn.pick("annotations/*/*.png")
    path.with_name("lost.png").write_bytes(path.read_bytes())
    return r"lost\.png"


@fault("masks", "stops")
def damaged_mask(drawn: Drawn) -> str:
    path = drawn.pick("annotations/*/*.png")
    os.truncate(path, 40)
    return rf"annotations/\w+/{named(path)}"


@fault("masks", "stops")
def damaged_scene(drawn: Drawn) -> str:
    path = drawn.pick("images/*/*.*")
    path.write_bytes(b"")
    return rf"images/\w+/{named(path)}"


@fault("masks", "stops")
def masks_that_do_not_count(drawn: Drawn) -> str:
    change_masks(drawn, lambda m: np.full_like(m, 255), "training")
    return "without pixels of any class.*255"


@fault("masks", "stops")
def class_file_of_another_length(drawn: Drawn) -> str:
    drawn.data["class_file"] = "classes.txt"
    (drawn.root / "classes.txt").write_text("sky\n" * (drawn.data["num_classes"] + 1))
    return r"classes\.txt.*num_classes"


@fault("masks", "warns")
def scene_in_both_splits(drawn: Drawn) -> str:
    source = drawn.pick("images/training/*.*")
    image = Image.open(source).convert("RGB")
    image.save(drawn.root / "images" / "validation" / "copy.png")
    mask = read_mask(drawn.root / "annotations" / "training" / f"{source.stem}.png")
    Image.fromarray(mask).save(drawn.root / "annotations" / "validation" / "copy.png")
    return r"copy\.png"
