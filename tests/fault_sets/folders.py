"""Class folders."""

from __future__ import annotations

import os

import numpy as np
from PIL import Image

from fault_sets.drawn import BLOCKS, NAMES, ORIENTATION, SIDE, Drawn, fault, named, odd


def write_folders(drawn: Drawn) -> None:
    names = NAMES[: drawn.rng.integers(2, 5)]
    for split, least in (("train", 3), ("val", 1)):
        for name in names:
            folder = drawn.root / split / name
            folder.mkdir(parents=True)
            for index in range(least + drawn.rng.integers(3)):
                ending = drawn.rng.choice(["png", "jpg", "bmp", "webp"])
                Image.fromarray(drawn.noise()).save(folder / f"{name}{index}.{ending}")
    drawn.data |= {"img_size": SIDE, "batch_size": 2}
    drawn.task |= {"model_args": BLOCKS, "mixup": 0, "cutmix": 0, "ema_decay": None}


@odd("folders")
def one_grey_image(drawn: Drawn) -> None:
    Image.fromarray(drawn.noise(channels=1)).save(drawn.root / "train" / "bee" / "grey.png")


@odd("folders")
def one_image_with_a_palette(drawn: Drawn) -> None:
    image = Image.fromarray(drawn.noise()).quantize(7)
    image.save(drawn.root / "val" / "ant" / "palette.png")


@odd("folders")
def one_transparent_image(drawn: Drawn) -> None:
    Image.fromarray(drawn.noise(channels=4)).save(drawn.root / "train" / "ant" / "clear.png")


@odd("folders")
def one_image_in_16_bits(drawn: Drawn) -> None:
    values = drawn.noise(channels=1).astype(np.uint16) * 257
    Image.fromarray(values).save(drawn.root / "train" / "ant" / "deep.png")


@odd("folders")
def images_of_rare_modes(drawn: Drawn) -> None:
    image = Image.fromarray(drawn.noise())
    image.convert("CMYK").save(drawn.root / "train" / "ant" / "print.jpg")
    image.convert("1").save(drawn.root / "train" / "bee" / "bits.png")
    values = drawn.noise(channels=1).astype(np.float32) / 255
    Image.fromarray(values).save(drawn.root / "val" / "ant" / "shares.tif")


@odd("folders")
def one_photograph_on_its_side(drawn: Drawn) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = int(drawn.rng.integers(2, 9))
    Image.fromarray(drawn.noise()).save(drawn.root / "train" / "ant" / "turned.jpg", exif=exif)


@odd("folders")
def a_class_of_two_files(drawn: Drawn) -> None:
    for split in ("train", "val"):
        (drawn.root / split / "emu").mkdir()
        Image.fromarray(drawn.noise()).save(drawn.root / split / "emu" / "1.png")
    Image.fromarray(drawn.noise()).save(drawn.root / "train" / "emu" / "2.png")


@odd("folders")
def a_class_that_validation_lacks(drawn: Drawn) -> None:
    (drawn.root / "train" / "fox").mkdir()
    for index in range(3):
        Image.fromarray(drawn.noise()).save(drawn.root / "train" / "fox" / f"{index}.png")


@odd("folders")
def hidden_files(drawn: Drawn) -> None:
    (drawn.root / "train" / ".ipynb_checkpoints").mkdir()
    Image.fromarray(drawn.noise()).save(drawn.root / "train" / ".ipynb_checkpoints" / "1.png")
    for name in (".DS_Store", "Thumbs.db", "._x.jpg"):
        (drawn.root / "train" / "ant" / name).write_bytes(b"\0\1")


@odd("folders")
def subfolders(drawn: Drawn) -> None:
    (drawn.root / "train" / "bee" / "night").mkdir()
    Image.fromarray(drawn.noise()).save(drawn.root / "train" / "bee" / "night" / "1.JPG")


@odd("folders")
def one_black_image(drawn: Drawn) -> None:
    for split in ("train", "val"):
        Image.new("RGB", (20, 20)).save(drawn.root / split / "ant" / "black.png")


@odd("folders")
def a_picture_twice_in_training(drawn: Drawn) -> None:
    image = Image.fromarray(drawn.noise())
    for index in "ab":
        image.save(drawn.root / "train" / "ant" / f"{index}.png")


@fault("folders", "warns")
def damaged_training_image(drawn: Drawn) -> str:
    path = drawn.pick("train/*/*.*")
    os.truncate(path, path.stat().st_size // 3)
    return named(path)


@fault("folders", "stops")
def damaged_validation_image(drawn: Drawn) -> str:
    path = drawn.pick("val/*/*.*")
    path.write_bytes(drawn.rng.choice([b"", b"no image", b"\x89PNG\r\n\x1a\n"]))
    return named(path)


@fault("folders", "stops")
def damaged_training_images_alone(drawn: Drawn) -> str:
    for path in drawn.root.glob("train/*/*.*"):
        path.write_bytes(b"<html>404</html>")
    return "all of them"


@fault("folders", "stops")
def values_of_unknown_meaning(drawn: Drawn) -> str:
    path = drawn.root / drawn.rng.choice(["train", "val"]) / "bee" / "odd.tif"
    if drawn.chance():
        values = drawn.noise(channels=1).astype(np.int32) * 3000
    else:
        values = drawn.noise(channels=1).astype(np.float32) * 3
    Image.fromarray(values).save(path)
    return r"odd\.tif.*value_range"


@fault("folders", "stops")
def values_that_are_not_finite(drawn: Drawn) -> str:
    values = drawn.noise(channels=1).astype(np.float32) / 255
    values[3, 3] = drawn.rng.choice([np.nan, np.inf])
    Image.fromarray(values).save(drawn.root / "train" / "bee" / "odd.tif")
    return r"odd\.tif.*not finite"


@fault("folders", "warns")
def cameras_of_12_bits(drawn: Drawn) -> str:
    for path in list(drawn.root.glob("*/*/*.*")):
        path.unlink()
        values = drawn.rng.integers(0, 4096, (SIDE, SIDE), dtype=np.uint16)
        Image.fromarray(values).save(path.with_suffix(drawn.rng.choice([".png", ".tif"])))
    return "value_range"


@fault("folders", "stops")
def too_large_image(drawn: Drawn) -> str:
    drawn.data["max_pixels"] = 4 * SIDE**2
    path = drawn.root / "train" / "ant" / "large.png"
    Image.fromarray(drawn.noise(width=4 * SIDE, height=4 * SIDE)).save(path)
    return r"large\.png.*max_pixels"


@fault("folders", "stops")
def one_class_in_all(drawn: Drawn) -> str:
    for split in ("train", "val"):
        for name in NAMES:
            for path in (drawn.root / split / name).glob("*"):
                path.rename(drawn.root / split / "ant" / f"{name}-{path.name}")
            if name != "ant" and (drawn.root / split / name).exists():
                (drawn.root / split / name).rmdir()
    return "one class.*ant|ant.*one class"


@fault("folders", "stops")
def class_of_another_name_in_validation(drawn: Drawn) -> str:
    (drawn.root / "val" / "bee").rename(drawn.root / "val" / drawn.rng.choice(["Bee", "wasp"]))
    return "(Bee|wasp)"


@fault("folders", "stops")
def image_outside_class_folders(drawn: Drawn) -> str:
    path = drawn.root / drawn.rng.choice(["train", "val"]) / "alone.png"
    Image.fromarray(drawn.noise()).save(path)
    return r"alone\.png"


@fault("folders", "warns")
def copies_in_validation(drawn: Drawn) -> str:
    path = drawn.pick("train/*/*.*")
    Image.open(path).save(drawn.root / "val" / "ant" / "copy.png")
    return r"copy\.png"


@fault("folders", "warns")
def picture_in_two_classes(drawn: Drawn) -> str:
    Image.open(drawn.pick("train/bee/*")).save(drawn.root / "train" / "ant" / "also.png")
    return r"another class.*also\.png"


@fault("folders", "warns")
def white_images(drawn: Drawn) -> str:
    for path in drawn.root.glob("train/*/*.*"):
        Image.new("RGB", (SIDE, SIDE), drawn.rng.choice(["white", "black"])).save(path)
    return "black or all white"


@fault("folders", "warns")
def files_that_are_no_images(drawn: Drawn) -> str:
    for name in ("a.jpg.part", "b.jpg.part", "notes.txt"):
        (drawn.root / "train" / "bee" / name).write_text("x")
    return r"2 \.part"


@fault("folders", "warns")
def class_folder_without_images(drawn: Drawn) -> str:
    (drawn.root / "train" / "yak").mkdir()
    return "yak"


@fault("folders", "stops")
def no_validation_split(drawn: Drawn) -> str:
    (drawn.root / "val").rename(drawn.root / "holdout")
    return "no split 'val'"
