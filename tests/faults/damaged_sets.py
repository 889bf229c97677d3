"""Images and tables that are odd or damaged, each in a set that is otherwise sound."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import tifffile
from command_sets import ODD, Scene
from PIL import Image

FORMATS = ("PNG", "JPEG", "TIFF", "WEBP", "BMP", "GIF")
MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I", "I;16", "F")
SIDES = (1, 2, 7, 16, 33, 300, 5000)
DTYPES = ("?", "u1", "i1", ">u2", "<i4", "u8", "f2", "f4", ">f8", "c8", "U3", "S2", "M8[s]", "O")
ARRAYS = (".npy", ".tif")
CELLS = (*ODD, 0, -1, 1.5, float("nan"), 10**30, True, None, b"ab", [1], {"a": 1})


def command_on_damaged(seed: int, scene: Scene, folder: Path) -> list[str]:
    """Write a seed's files into a folder; the command that reads them.

    Half are images and half tables; a tenth are read by `fit`.
    """
    rng = np.random.default_rng(seed)
    fits = rng.random() < 0.1
    cases = _FILES[seed % 2]
    return cases[rng.integers(len(cases))](rng, scene, folder, "fit" if fits else "data check")


def picture(rng: np.random.Generator) -> tuple[bytes, str]:
    """An image file of any mode and size, and its ending."""
    kind, mode = str(rng.choice(FORMATS)), str(rng.choice(MODES))
    width, height = (int(side) for side in rng.choice(SIDES[:6], 2))
    if rng.random() < 0.02:
        width = SIDES[-1]
    noise = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = image.convert("RGB" if mode == "LAB" else "L" if mode == "I;16" else mode)
        if mode == "I;16":
            image = Image.fromarray(np.asarray(image, np.uint16) * 200)
        pages = [image] * (int(rng.integers(2, 4)) if kind in ("TIFF", "GIF") else 1)
        several = {"save_all": True, "append_images": pages[1:]} if pages[1:] else {}
        stream = BytesIO()
        try:
            image.save(stream, kind, **several)
        except (OSError, ValueError):  # not a mode of this format
            image.convert("RGB").save(stream, kind)
    return stream.getvalue(), f".{kind.lower()}"


def array(rng: np.random.Generator) -> tuple[bytes, str]:
    """An array of any shape and kind in an NPY or TIFF file, and its ending."""
    ending = str(rng.choice(ARRAYS))
    shape = tuple(rng.choice([0, 1, 2, 3, 16, 20, 33], rng.integers(0, 6)).tolist())
    if rng.random() < 0.5:
        shape = (2, *shape[:2])
    stream = BytesIO()
    if ending == ".npy":
        values = np.zeros(shape, str(rng.choice(DTYPES)))
        np.save(stream, values.T if rng.random() < 0.2 else values, allow_pickle=True)
    else:
        values = np.ones(
            (*shape, 3, 5)[:5], rng.choice(["?", "u1", ">u2", "<i4", "f2", "f8", "c8"])
        )
        with warnings.catch_warnings(), suppress(ValueError):  # of some shapes in strips
            warnings.simplefilter("ignore")
            tifffile.imwrite(stream, values, photometric="minisblack")
    return stream.getvalue(), ending


def damage(rng: np.random.Generator, content: bytes) -> bytes:
    """A file that lost its end, a block or bits, or that is none; a quarter stay as they are."""
    kind, data = rng.integers(8), bytearray(content)
    if kind < 2:
        return content
    start, end = np.sort(rng.integers(0, len(data) + 1, 2)).tolist()
    if kind == 2:
        return content[:start]
    if kind == 3:
        data[start:end] = bytes(end - start)
    elif kind == 4:
        data[start:end] = b""
    elif kind == 5:  # the header, where sizes are
        for place in rng.integers(0, min(len(data), 64) or 1, 3):
            data[place : place + 1] = bytes([int(rng.choice([0, 1, 127, 128, 255]))])
    elif kind == 6:
        for place in rng.integers(0, len(data) or 1, 8):
            data[place : place + 1] = bytes([int(rng.integers(256))])
    else:
        odd = [b"", b"\0", b"<html>", b"\xff" * 99, rng.bytes(99), b"\n" * 3, content + b"more"]
        return odd[rng.integers(len(odd))]
    return bytes(data)


def _images_of_a_command(rng: Any, scene: Scene, folder: Path, training: str) -> list[str]:
    names = ["predict", "reconstruct", "segment", "detect"]
    command = names[rng.integers(4)]
    content, ending = picture(rng)
    name = str(rng.choice(["photo", *filter(_is_name, ODD)])) + ending
    (folder / name).write_bytes(damage(rng, content))
    words = [word for word in scene.sound(command) if not word.endswith(".png")]
    sound = [str(scene.root / "photo.png")] if rng.random() < 0.5 else []
    return [command, *words, *sound, f"{folder}/{name}", "--out", str(folder / "out")]


def _arrays_of_predict(rng: Any, scene: Scene, folder: Path, training: str) -> list[str]:
    content, ending = array(rng)
    (folder / f"cells{ending}").write_bytes(damage(rng, content))
    return ["predict", "--model", f"{scene.root}/channels.safetensors", f"{folder}/cells{ending}"]


def _arrays_of_a_table(rng: Any, scene: Scene, folder: Path, training: str) -> list[str]:
    root = _copy(scene, "tables", folder)
    files = sorted(root.glob("*.npy"))
    content, _ = array(rng)
    file = files[rng.integers(len(files))]
    file.write_bytes(damage(rng, content if rng.random() < 0.5 else file.read_bytes()))
    return _of_a_table(rng, scene, root, training)


def _images_of_a_set(rng: Any, scene: Scene, folder: Path, training: str) -> list[str]:
    layout = str(rng.choice(["folders", "masks", "coco"]))
    root = _copy(scene, layout, folder)
    files = sorted(path for path in root.rglob("*.*") if path.suffix in (".png", ".jpg", ".bmp"))
    file = files[rng.integers(len(files))]
    content, _ = picture(rng)
    file.write_bytes(damage(rng, content if rng.random() < 0.5 else file.read_bytes()))
    return _of_a_recipe(scene, layout, root, training)


def _tables(rng: Any, scene: Scene, folder: Path, training: str) -> list[str]:
    root = _copy(scene, "tables", folder)
    frame = pd.read_csv(root / "table.csv", dtype=object)
    for _ in range(rng.integers(0, 4)):
        column = frame.columns[rng.integers(len(frame.columns))]
        kind = rng.integers(5)
        if kind < 2:
            cell = CELLS[rng.integers(len(CELLS))]
            frame.at[int(rng.integers(len(frame))), column] = cell
        elif kind == 2:
            frame = frame.drop(columns=column) if len(frame.columns) > 1 else frame.iloc[:0]
        elif kind == 3:
            frame = frame.rename(columns={column: ODD[rng.integers(len(ODD))]})
        else:
            frame[column] = pd.Series([CELLS[rng.integers(len(CELLS))]] * len(frame), dtype=object)
        frame = frame.loc[:, ~frame.columns.duplicated()]
    name = str(rng.choice(["table.csv", "table.tsv", "table.parquet"]))
    (root / "table.csv").unlink()
    content = _written(rng, frame, name)
    (root / name).write_bytes(damage(rng, content) if rng.random() < 0.5 else content)
    return _of_a_table(rng, scene, root, training, name)


def _written(rng: Any, frame: pd.DataFrame, name: str) -> bytes:
    if name.endswith("parquet"):
        try:
            return frame.rename(columns=_sayable).to_parquet(index=False)
        except (ValueError, TypeError, OverflowError):  # columns of one kind each
            return frame.astype(str).map(_sayable).rename(columns=_sayable).to_parquet(index=False)
    text = frame.to_csv(index=False, sep="\t" if name.endswith("tsv") else ",")
    encoding = rng.choice(["utf-8", "utf-8", "utf-8-sig", "utf-16", "latin-1"])
    handler = "surrogateescape" if encoding.startswith("utf-8") else "replace"
    return text.encode(encoding, handler)


def _sayable(text: Any) -> str:
    return str(text).encode("utf-8", "replace").decode()


def _coco(rng: Any, scene: Scene, folder: Path, training: str) -> list[str]:
    root = _copy(scene, "coco", folder)
    file = root / "annotations" / f"instances_{rng.choice(['train2017', 'val2017'])}.json"
    content = json.loads(file.read_text())
    for _ in range(rng.integers(1, 4)):
        _change_a_value(rng, content)
    text = json.dumps(content, default=str, ensure_ascii=bool(rng.integers(2)))
    data = text.encode(rng.choice(["utf-8", "utf-8", "utf-16"]), "surrogatepass")
    file.write_bytes(damage(rng, data) if rng.random() < 0.3 else data)
    return _of_a_recipe(scene, "coco", root, training)


def _change_a_value(rng: Any, value: Any) -> None:
    """Change, drop or nest one value somewhere inside."""
    while value:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        key = keys[rng.integers(len(keys))]
        if isinstance(value[key], dict | list) and rng.random() < 0.85:
            value = value[key]
            continue
        kind = rng.integers(4)
        if kind == 0:
            del value[key]
        elif kind == 1:
            value[key] = [value[key]]
        else:
            value[key] = CELLS[rng.integers(len(CELLS))]
        return


def _lists_of_classes(rng: Any, scene: Scene, folder: Path, training: str) -> list[str]:
    """A recipe or a list of names that is no text of UTF-8."""
    text = (scene.root / "folders.yaml").read_text()
    place = rng.integers(len(text))
    text = text[:place] + str(ODD[rng.integers(len(ODD))]) + text[place:]
    data = text.encode(rng.choice(["utf-8", "utf-16", "latin-1"]), "replace")
    (folder / "recipe.yaml").write_bytes(damage(rng, data) if rng.random() < 0.3 else data)
    return [*training.split(), f"--config={folder}/recipe.yaml"]


def _of_a_table(
    rng: Any, scene: Scene, root: Path, training: str, name: str = "table.csv"
) -> list[str]:
    kind = rng.integers(3)
    if kind == 0 and training != "fit":
        return ["data", "stats", f"{root}/{name}"]
    if kind == 1 and training != "fit":
        return [
            "channels",
            f"{scene.root}/channels.safetensors",
            "--root",
            f"{root}",
            "--table",
            name,
        ]
    return [*_of_a_recipe(scene, "tables", root, training), f"--data.table={name}"]


def _of_a_recipe(scene: Scene, layout: str, root: Path, training: str) -> list[str]:
    return [*training.split(), f"--config={scene.root}/{layout}.yaml", f"--data.root={root}"]


def _copy(scene: Scene, layout: str, folder: Path) -> Path:
    return Path(shutil.copytree(scene.root / layout, folder / layout))


def _is_name(text: str) -> bool:
    return "/" not in text and len(text) < 200


_Case = Callable[[np.random.Generator, Scene, Path, str], list[str]]
_FILES: tuple[list[_Case], list[_Case]] = (
    [
        _images_of_a_command,
        _images_of_a_command,
        _images_of_a_set,
        _arrays_of_predict,
        _arrays_of_a_table,
    ],
    [_tables, _tables, _coco, _coco, _lists_of_classes],
)
