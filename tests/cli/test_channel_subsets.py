"""`fastvim channels`: subsets of the channels, evaluated with the same weights."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from fastvim.models import create_model
from fastvim.weights import save
from fastvim_cli import main

SIZES = {"img_size": 8, "patch_size": 4, "in_chans": 3, "embed_dim": 16, "depth": 1}
OPTIONS = {**SIZES, "num_classes": 2}


@pytest.fixture
def images(tmp_path) -> Path:
    """Ten images of three channels; those of class "b" have a bright last channel."""
    root = tmp_path / "images"
    root.mkdir()
    rows = [("path", "label", "split")]
    for i in range(10):
        image = np.random.default_rng(i).integers(0, 50, (3, 8, 8), dtype=np.uint8)
        image[2] += 200 * (i % 2)
        np.save(root / f"{i}.npy", image)
        rows.append((f"{i}.npy", "ab"[i % 2], "train" if i < 4 else "val"))
    with (root / "table.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return root


def write(path: Path, name: str = "fastchannelvim_small_patch16_224", **metadata) -> str:
    torch.manual_seed(0)
    options = OPTIONS if "channel" in name else {**SIZES, "num_classes": 2}
    model = create_model(name, **options)
    told = {"class_names": ["a", "b"], "mean": [100.0] * 3, "std": [50.0] * 3, "img_size": 8}
    path.parent.mkdir(exist_ok=True)
    save(path, model.state_dict(), {"model": name, "model_args": options, **told, **metadata})
    return str(path)


def test_channels(images, tmp_path, capsys):
    paths = [write(tmp_path / name / "model.safetensors") for name in ("one", "two")]
    out = tmp_path / "out"
    assert main(["channels", *paths, "--root", str(images), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "one" in printed
    assert "two" in printed
    record = json.loads((out / "channels.json").read_text())
    assert record["one"] == record["two"]  # the same weights
    assert [row["channels"] for row in record["one"]] == [
        [0], [1], [2], [0, 1], [0, 2], [1, 2], [0, 1, 2],
    ]  # fmt: skip
    assert all(
        row["accuracy"] * 6 == pytest.approx(round(row["accuracy"] * 6)) for row in record["one"]
    )
    assert (out / "channels.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        ({"name": "fastvim_tiny_patch16_224"}, [], "is a classifier: see fastvim predict"),
        ({"class_names": ["a", "c"]}, [], "class 'b' is none of the 2 classes of"),
        ({}, ["--names", "x", "y"], "--names x y"),
        ({}, ["--most", "0"], "--most: 0: expected 1 or more"),
    ],
)
def test_mistakes_are_told_in_a_line(changes, arguments, message, images, tmp_path, capsys):
    path = write(tmp_path / "run" / "model.safetensors", **changes)
    assert main(["channels", path, "--root", str(images), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
