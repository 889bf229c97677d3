"""Files that a disk has damaged: named, or of no consequence; never a traceback.

What has a checksum is named or reads as it was written. What has none may read as another sound
file. `make test-faults` runs all draws.
"""

from __future__ import annotations

import shutil
import tarfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import pytest
import tifffile
import torch
import yaml
from command_sets import Scene
from fuzzing import groups
from small import Small, fresh, half_written, result
from tally import Tally
from test_checkpoint_files import flip as flip_bit
from test_checkpoint_files import places

from fastvim.errors import UserError
from fastvim.weights import read

DRAWS, DRAWS_IN_ALL = 520, 16
RESUMED, RESUMED_IN_ALL = 24, 0  # of the files of a training run
FLIPS = 200


def truncate(content: bytearray, rng: np.random.Generator) -> None:
    del content[int(rng.integers(len(content))) :]


def flip(content: bytearray, rng: np.random.Generator) -> None:
    content[int(rng.integers(len(content)))] ^= 1 << int(rng.integers(8))


def overwrite(content: bytearray, rng: np.random.Generator) -> None:
    first, size = _block(content, rng)
    content[first : first + size] = rng.bytes(size)


def zero(content: bytearray, rng: np.random.Generator) -> None:
    first, size = _block(content, rng)
    content[first : first + size] = bytes(size)


def empty(content: bytearray, rng: np.random.Generator) -> None:
    content.clear()


def mix(content: bytearray, rng: np.random.Generator) -> None:
    """The end of the file is that of another: here its own bytes, some blocks off."""
    place = int(rng.integers(len(content)))
    content[place:] = content[place // 2 : place // 2 + len(content) - place]


def _block(content: bytearray, rng: np.random.Generator) -> tuple[int, int]:
    first = int(rng.integers(len(content)))
    return first, min(int(rng.integers(1, 4096)), len(content) - first)


DAMAGES: tuple[Callable[[bytearray, np.random.Generator], None], ...] = (
    *(truncate, flip, overwrite, zero, empty, mix),
)


class Kind(NamedTuple):
    """A kind of file.

    Attributes:
        file: one that is sound.
        words: of the command that reads it.
        checked: whether it has a checksum.
        text: whether a line about it names what stands in it, not the file.
    """

    file: Path
    words: list[str]
    checked: bool = False
    text: bool = False


@pytest.fixture(scope="module")
def kinds(small: Small, tmp_path_factory) -> dict[str, Kind]:
    """A file of each kind that a command reads; nothing else reads them."""
    scene = Scene(tmp_path_factory.mktemp("scene") / "sound")
    at, picture = scene.root, str(scene.root / "photo.png")
    run = fresh(small.folder / "to_damage")
    assert small.warm.run(*small.words("fit"), cwd=run).code == 0
    checkpoint, weights = run / "run/checkpoints/last.ckpt", run / "run/model.safetensors"
    config = run / "run/logs/version_0/config.yaml"
    small.warm.run("convert", weights, run / "ours.pth")
    torch.save(torch.load(run / "ours.pth", weights_only=True), run / "others.pth")
    table = pd.read_csv(at / "tables/table.csv")
    table.to_parquet(at / "tables/table.parquet")
    with tarfile.open(at / "folders/train.tar", "w") as tar:
        tar.add(at / "folders/train", ".")
    shutil.move(at / "folders/train", at / "in_tar")
    tifffile.imwrite(at / "cells.tif", np.load(at / "cells.npy"))
    (at / "masks/classes.txt").write_text("sky\nearth\nsea\nfire\n")
    folders = [f"--config={at}/folders.yaml"]
    predict = ["predict", "--out", "out", "--model"]
    found = {
        "training checkpoint": Kind(checkpoint, [*predict, str(checkpoint), picture], True),
        "model.safetensors": Kind(weights, [*predict, str(weights), picture], True),
        "weights of convert": Kind(
            run / "ours.pth", ["convert", str(run / "ours.pth"), "out/w.safetensors"], True
        ),
        "weights of torch.save": Kind(
            run / "others.pth", ["convert", str(run / "others.pth"), "out/w.safetensors"], True
        ),
        "config.yaml": Kind(
            config, ["data", "check", "--no-read", f"--config={config}"], text=True
        ),
        # One that ends between two members is a shorter one: what it lacks may be named.
        "tar": Kind(at / "folders/train.tar", ["data", "check", *folders], text=True),
        "class_file": Kind(
            at / "masks/classes.txt",
            ["data", "check", f"--config={at}/masks.yaml", "--data.class_file=classes.txt"],
            text=True,
        ),
        "COCO": Kind(
            at / "coco/annotations/instances_train2017.json",
            ["data", "check", f"--config={at}/coco.yaml"],
            text=True,
        ),
        "mask": Kind(
            sorted((at / "masks/annotations/training").iterdir())[0],
            ["data", "check", f"--config={at}/masks.yaml"],
        ),
        "table": Kind(
            at / "tables/table.csv", ["data", "stats", f"{at}/tables/table.csv"], text=True
        ),
        "Parquet": Kind(
            at / "tables/table.parquet",
            ["data", "stats", f"{at}/tables/table.parquet"],
            text=True,
        ),
    }
    images = {"PNG": "photo.png", "JPEG": "photo.jpg", "NPY": "cells.npy", "TIFF": "cells.tif"}
    for name, file in images.items():
        model = at / ("classifier" if file.startswith("photo") else "channels")
        found[name] = Kind(at / file, [*predict, f"{model}.safetensors", str(at / file)])
    return found


@pytest.fixture(scope="module")
def unharmed(small: Small, kinds: dict[str, Kind]) -> Callable[[str], dict[str, object]]:
    """What the command of a kind writes of a sound file; run once."""

    @cache
    def run(name: str) -> dict[str, object]:
        folder = fresh(small.folder / "unharmed" / name.replace(" ", "_"))
        (folder / "out").mkdir()
        ended = small.warm.run(*kinds[name].words, cwd=folder)
        assert ended.code == 0, (name, ended)
        return result("predict", folder)

    return run


@pytest.mark.faults
def test_sound_files(kinds, unharmed):
    assert all(unharmed(name) is not None for name in kinds)


@pytest.mark.parametrize("seeds", groups(DRAWS, DRAWS_IN_ALL, size=16))
def test_files_that_commands_read(seeds, small, kinds, unharmed, record_property):
    tally = Tally()
    for seed in seeds:
        rng = np.random.default_rng(seed)
        name, damage = list(kinds)[seed % len(kinds)], DAMAGES[seed // len(kinds) % len(DAMAGES)]
        kind, folder = kinds[name], fresh(small.folder / "damaged")
        (folder / "out").mkdir()
        sound = kind.file.read_bytes()
        content = bytearray(sound)
        damage(content, rng)
        kind.file.write_bytes(content)
        try:
            ended = small.warm.run(*kind.words, cwd=folder)
        finally:
            kind.file.write_bytes(sound)
        problems = ended.problems + half_written(folder)
        if ended.code and not kind.text and kind.file.name not in ended.stderr:
            problems.append(f"not named: {ended.stderr[-300:]}")
        if kind.checked and not ended.code and result("predict", folder) != unharmed(name):
            problems.append("other results, and nothing said")
        tally.count(f"{name} damaged", seed, [f"{damage.__name__}: {each}" for each in problems])
    tally.record(record_property)


@pytest.mark.faults
@pytest.mark.parametrize("name", ["training checkpoint", "model.safetensors", "weights of convert"])
def test_bits_of_tensors(name, kinds, tmp_path, record_property):
    """Every one that flips is noticed."""
    tally, rng = Tally(), np.random.default_rng(0)
    file = Path(shutil.copy(kinds[name].file, tmp_path))
    if file.suffix == ".safetensors":
        first = 8 + int.from_bytes(file.read_bytes()[:8], "little")
        records = [(first, file.stat().st_size - first)]
    else:
        records = [(start, size) for record, start, size in places(file) if "/data/" in record]
    bytes_of_tensors = np.concatenate([np.arange(start, start + size) for start, size in records])
    for number, byte in enumerate(rng.choice(bytes_of_tensors, FLIPS, replace=False)):
        bit = int(rng.integers(8))
        flip_bit(file, int(byte), bit)
        try:
            read(file)
            problems = [f"byte {byte}, bit {bit}: not noticed"]
        except UserError as error:
            problems = [] if f"{file.name} is damaged" in str(error) else [str(error)]
        flip_bit(file, int(byte), bit)
        tally.count(f"bit flipped in tensors of {name}", number, problems)
    read(file)
    tally.record(record_property)


@pytest.fixture(scope="module")
def half_done(small: Small) -> tuple[Path, dict[str, object]]:
    """A run after one of its two epochs, and what it ends with."""
    folder = fresh(small.folder / "half_done")
    first = yaml.safe_load(small.recipe.read_text())
    first["trainer"]["max_epochs"] = 1
    (folder / "first.yaml").write_text(yaml.safe_dump(first))
    whole = fresh(small.folder / "whole")
    ended = small.warm.run("fit", "--config", folder / "first.yaml", cwd=folder)
    assert ended.code == 0, ended
    shutil.copytree(folder, whole, dirs_exist_ok=True)
    assert small.warm.run(*small.words("fit"), cwd=whole).code == 0
    return folder, result("fit", whole)


@pytest.mark.parametrize("seeds", groups(RESUMED, RESUMED_IN_ALL, size=4))
def test_files_of_a_run_that_goes_on(seeds, small, half_done, record_property):
    """It ends with the same weights: an earlier checkpoint is taken, and this is said."""
    tally, (start, expected) = Tally(), half_done
    for seed in seeds:
        rng = np.random.default_rng(seed)
        name = ("checkpoints/last.ckpt", "logs/version_0/metrics.csv")[seed % 2]
        damage = DAMAGES[seed // 2 % len(DAMAGES)]
        folder = fresh(small.folder / "goes_on")
        shutil.copytree(start, folder, dirs_exist_ok=True)
        file = folder / "run" / name
        content = bytearray(file.read_bytes())
        damage(content, rng)
        file.write_bytes(content)
        ended = small.warm.run(*small.words("fit"), cwd=folder)
        # The damaged checkpoint stays where it is; the run writes others beside it.
        broken = [each for each in half_written(folder) if not each.startswith(f"{file.name}:")]
        problems = ended.problems + broken
        if ended.code:
            problems.append(f"{damage.__name__}, code {ended.code}: {ended.stderr[-300:]}")
        elif result("fit", folder) != expected:
            problems.append(f"{damage.__name__}: other weights")
        tally.count(f"{file.name} damaged, run resumed", seed, problems)
    tally.record(record_property)
