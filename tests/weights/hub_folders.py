"""Folders of small models in the forms of the table, and what `fastvim predict` says of images."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import published_files as files
import pytest
from PIL import Image

from fastvim.weights import convert
from fastvim.weights.table import ENTRIES, Entry
from fastvim_cli import main

PHOTOS = [
    name
    for name, entry in files.PUBLISHED.items()
    if entry.task == "classification" and entry.images["in_chans"] == 3
]


def folder_of(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What `fastvim convert NAME FOLDER` makes of a published file in small."""
    entry: Entry = files.small(files.PUBLISHED[name], "https://github.com")
    monkeypatch.setitem(ENTRIES, name, entry)
    published = tmp_path / "published"
    published.mkdir()
    (published / entry.file).write_bytes(files.write(entry))
    monkeypatch.setenv("FASTVIM_WEIGHTS", str(published))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    convert(name, tmp_path / "folder")
    return tmp_path / "folder"


def draw(folder: Path, mode: str = "RGB", count: int = 2) -> list[str]:
    """Images of noise, of sizes that are not the model's."""
    random = np.random.default_rng(0)
    paths = []
    for i in range(count):
        pixels = random.integers(0, 256, (260 + 9 * i, 300, 3), dtype=np.uint8)
        paths.append(str(folder / f"{i}.png"))
        Image.fromarray(pixels).convert(mode).save(paths[-1])
    return paths


def predicted(folder: Path, images: Sequence[str], out: Path) -> list[dict[str, float]]:
    """By class, what `fastvim predict` says of the best classes of each image."""
    weights = str(folder / "model.safetensors")
    assert main(["predict", "--model", weights, "--out", str(out), *images]) == 0
    lines = (out / "predictions.jsonl").read_text().splitlines()
    return [{e["class"]: e["probability"] for e in json.loads(line)["top"]} for line in lines]
