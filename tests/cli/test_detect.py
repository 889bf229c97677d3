"""`fastvim detect`, as a person calls it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from coco_sets import write_set
from PIL import Image

from fastvim.data.dense_data import prepare_objects
from fastvim.models import create_model
from fastvim.models.heads.cascade import build_detector
from fastvim.models.heads.results import coco_results, decode, encode
from fastvim.pictures.detections import draw_detections
from fastvim.weights import load_model, save
from fastvim_cli import main

MODEL = "fastvim_tiny_patch16_224"
ARGS = {"img_size": 64, "patch_size": 8, "embed_dim": 32, "depth": 2, "norm": "layer"}
HEADS = {"hidden_dim": 16, "samples": 16, "score_thresh": 0.0, "detections": 5}
HEAD = {"num_classes": 2, "channels": 16, "pad_to": 0, "proposals": 50, "heads": HEADS}
TOLD = {"class_names": ["box", "disc"], "category_ids": [3, 7], "img_size": 64}


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    model = build_detector(create_model(MODEL, **ARGS), **HEAD)
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    save(path, model.state_dict(), {"model": MODEL, "model_args": ARGS, "detection": HEAD, **TOLD})
    return path


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return write_set(tmp_path_factory.mktemp("images")) / "val2017"


def detect(weights: Path, out: Path, *words: object) -> list[dict]:
    assert main(["detect", str(weights), *map(str, words), "--out", str(out)]) == 0
    return json.loads((out / "detections.json").read_text())


def test_results_are_the_models(weights, images, tmp_path, capsys):
    results = detect(weights, tmp_path, images, "--score", "0.3")
    assert len(results) == 5 * 5
    assert {result["image_id"] for result in results} == {0, 1, 2, 3, 4}  # as the files are called
    model, _ = load_model(path=weights)
    with Image.open(images / "2.png") as image, torch.inference_mode():
        (found,) = model.eval().detect([prepare_objects(image, 64)])
    expected = coco_results(found, (64, 64), (64, 64), 2, [3, 7])
    own = [result for result in results if result["image_id"] == 2]
    assert {result.pop("file_name") for result in own} == {str(images / "2.png")}
    for one, other in zip(own, expected, strict=True):
        assert one["bbox"] == pytest.approx(other["bbox"])
        assert one["category_id"] == other["category_id"]
        assert one["score"] == pytest.approx(other["score"])
        assert one["segmentation"] == other["segmentation"]
    sure = sum(result["score"] >= 0.3 for result in own)
    line = next(line for line in capsys.readouterr().out.splitlines() if "2.png: " in line)
    listed = line.partition(": ")[2].partition(", drawn")[0]
    counts = [int(part.split(" x ")[0]) for part in listed.split(", ") if " x " in part]
    assert sum(counts) == sure


def test_an_image_of_another_size(weights, tmp_path):
    photograph = tmp_path / "photograph.jpg"
    noise = np.random.default_rng(0).integers(0, 255, (90, 250, 3), dtype=np.uint8)
    Image.fromarray(noise).save(photograph)
    (tmp_path / "broken.png").write_bytes(b"no image")
    results = detect(weights, tmp_path / "out", tmp_path)
    assert {result["image_id"] for result in results} == {2}  # the second of two
    for result in results:
        x, y, width, height = result["bbox"]
        assert x >= 0
        assert y >= 0
        assert x + width <= 250.01
        assert y + height <= 90 * 32 / 23 + 0.01  # it is seen 23 pixels high, padded to 32
        assert decode(result["segmentation"]).shape == (90, 250)
    with Image.open(tmp_path / "out" / "photograph_detections.png") as picture:
        assert picture.width > 2 * 4 * 250  # two panels, each pixel four of theirs


@pytest.mark.parametrize("names", [{3: "box", 7: "disc"}, {7: "disc"}])
def test_what_is_drawn(names):
    """A tint within its mask, and a box around it; nothing changes the rest of the image."""
    mask = np.zeros((64, 64), dtype=np.uint8)
    mask[20:40, 10:40] = 1
    encoded = encode(mask)
    result = {"category_id": 7, "bbox": [8, 18, 34, 24], "segmentation": encoded, "score": 0.93}
    image = Image.new("RGB", (64, 64), (30, 30, 30))
    empty, drawn = (
        np.asarray(draw_detections(image, found, names)).astype(int) for found in ([], [result])
    )
    above = 1065  # the legend
    changed = (empty[:above] != drawn[:above]).any(-1)
    assert not changed[:, : drawn.shape[1] // 2].any()  # the image itself
    panel = changed[:, drawn.shape[1] // 2 :]
    rows, columns = np.flatnonzero(panel.any(1)), np.flatnonzero(panel.any(0))
    box = [columns[-1] - columns[0], rows[-1] - rows[0]]
    assert box[0] == pytest.approx(34 * 16, abs=8)
    assert box[1] == pytest.approx(24 * 16 + 16, abs=24)  # and the label above
    inside = panel[rows[0] + 100 : rows[-1] - 100, columns[0] + 100 : columns[-1] - 100]
    assert inside.all()


def test_nothing_found(weights, images, tmp_path, capsys):
    detect(weights, tmp_path, images / "0.png", "--score", "1")
    assert "0.png: nothing, drawn in" in capsys.readouterr().out


def test_the_size_is_that_of_the_evaluation(weights, images, tmp_path):
    model, metadata = load_model(path=weights)
    file = tmp_path / "model.safetensors"
    save(file, model.state_dict(), {**metadata, "img_size": 32, "eval_size": 64})
    one, other, less = (
        detect(of, tmp_path / str(number), images / "2.png", *words)
        for number, (of, words) in enumerate(
            [(file, ()), (weights, ()), (file, ("--img-size", 32))]
        )
    )
    assert one == other != less


def test_mistakes_are_one_line(weights, images, tmp_path, capsys):
    untold = tmp_path / "untold.safetensors"
    model, metadata = load_model(path=weights)
    del metadata["img_size"]
    save(untold, model.state_dict(), metadata)
    for words, message in (
        ((untold, images), "does not say img_size"),
        ((weights, "nowhere"), "no image among 1 files"),
        ((weights, images, "--score", "2"), "--score: 2: expected 0 to 1"),
        ((weights, images, "--img-size", "0"), "--img-size: 0"),
    ):
        assert main(["detect", *map(str, words), "--out", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert message in error, error
        assert error.splitlines()[-1].startswith("fastvim: error: ")


def test_a_trained_detector_goes_to_published_names_and_back(weights, tmp_path):
    """But for what its background has and never uses."""
    assert main(["convert", str(weights), str(tmp_path / "out.pth")]) == 0
    expected, metadata = load_model(path=weights)
    found, again = load_model(path=tmp_path / "out.pth")
    for key in ("class_names", "category_ids"):
        assert again[key] == metadata[key]
    assert again["antialias"] == metadata.get("antialias", True)
    image = torch.rand(3, 50, 70)
    with torch.inference_mode():
        (one,), (other,) = (model.eval().detect([image]) for model in (found, expected))
    assert one.keys() == other.keys()
    for name, tensor in other.items():
        assert torch.equal(one[name], tensor)
