"""The commands on files of published models: what they read, resize, pad and answer.

The files and what the published implementations answered with them are in golden/whole.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastvim.data.dense_data import prepare_objects
from fastvim.models.heads.results import decode, paste
from fastvim.weights import load_model, read, save
from fastvim_cli import main

WHOLE = Path(__file__).parents[1] / "golden" / "whole"
CLASSES = ["wall", "sky", "tree", "road", "door"]


def arrays(name: str):
    return np.load(WHOLE / f"{name}.npz")


def write_image(rgb: np.ndarray, path: Path) -> str:
    """A PNG file, as a person has it."""
    Image.fromarray(np.ascontiguousarray(rgb)).save(path)
    return str(path)


@pytest.mark.parametrize("case", ["whole", "slide", "pipeline"])
@pytest.mark.parametrize("first", [True, False])
def test_segment(case, first, tmp_path, capsys):
    golden = arrays("segmentor")
    photo = write_image(golden[f"{case}/image_bgr"][..., ::-1], tmp_path / "photo.png")
    weights = [str(WHOLE / "segmentor.pth")]
    words = [*weights, photo] if first else [photo, "--model", *weights]
    if case == "slide":  # was not resized
        words += ["--model-arg", "base_size=[114, 81]"]
    assert main(["segment", *words, "--out", str(tmp_path)]) == 0
    with Image.open(tmp_path / "photo_classes.png") as picture:
        assert np.array_equal(np.asarray(picture), golden[f"{case}/labels"].squeeze())
    shares = np.bincount(golden[f"{case}/labels"].ravel(), minlength=len(CLASSES))
    assert f": {CLASSES[int(shares.argmax())]} " in capsys.readouterr().out


@pytest.mark.parametrize(("image", "case"), [("image_bgr", "result"), ("padded_bgr", "padded")])
def test_detect(image, case, tmp_path):
    golden = arrays("detector")
    photo = write_image(golden[image][..., ::-1], tmp_path / "photo.png")
    weights = str(WHOLE / "detector.pth")
    assert main(["detect", weights, photo, "--out", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "detections.json").read_text())
    left = list(zip(results, open_pixels(photo), strict=True))
    shape = golden[f"{case}/masks_shape"]
    masks = np.unpackbits(golden[f"{case}/masks"], count=int(np.prod(shape))).reshape(shape)
    expected = [golden[f"{case}/{name}"] for name in ("boxes", "scores", "labels")]
    for box, score, label, mask in zip(*expected, masks, strict=True):
        alike = [i for i, (one, _) in enumerate(left) if one["category_id"] == label + 1]
        nearest = min(alike, key=lambda i: np.abs(corners(left[i][0]) - box).max())
        one, undecided = left.pop(nearest)
        np.testing.assert_allclose(corners(one), box, atol=0.02, rtol=0)
        assert one["score"] == pytest.approx(score, abs=2e-4)
        differs = decode(one["segmentation"]) != mask
        assert not (differs & ~undecided).any()
    assert not left


def open_pixels(photo: str) -> list[np.ndarray]:
    """Of each detection the pixels whose probability is within 1e-3 of the threshold."""
    model, _ = load_model(path=WHOLE / "detector.pth")
    image = Image.open(photo)
    prepared = prepare_objects(image, 128, antialias=False)
    with torch.inference_mode():
        (found,) = model.eval().detect([prepared])
    scale = torch.tensor([prepared.shape[2] / image.width, prepared.shape[1] / image.height] * 2)
    pixels = []
    for box, mask in zip((found["boxes"] / scale).tolist(), found["masks"][:, 0], strict=True):
        low, high = (paste(mask + more, box, (image.height, image.width)) for more in (-1e-3, 1e-3))
        assert (low != high).mean() < 0.01
        pixels.append(low != high)
    return pixels


def corners(result: dict) -> np.ndarray:
    x, y, width, height = result["bbox"]
    return np.array([x, y, x + width, y + height])


@pytest.mark.parametrize(
    ("file", "words", "logits"),
    [
        ("classifier", [], "logits_ema"),
        ("classifier", ["--raw"], "logits_raw"),
        ("finetuned", ["--model-arg", "pool_scale=0.25"], "logits_raw"),
    ],
    ids=["averaged", "raw", "fine-tuned"],
)
def test_predict(file, words, logits, tmp_path):
    golden = arrays(file)
    photos = [
        write_image(image, tmp_path / f"{number}.png")
        for number, image in enumerate(golden["image_rgb"])
    ]
    # Evaluation crops the middle of an image; these are whole inputs.
    weights = tmp_path / "uncropped.safetensors"
    assert main(["convert", str(WHOLE / f"{file}.ckpt"), str(weights), *words]) == 0
    checkpoint = read(weights)
    save(weights, checkpoint.state, {**checkpoint.metadata, "crop_pct": 1.0})
    assert main(["predict", *photos, "--model", str(weights), "--out", str(tmp_path)]) == 0
    expected = torch.from_numpy(golden[logits]).softmax(dim=-1)
    lines = (tmp_path / "predictions.jsonl").read_text().splitlines()
    for line, row in zip(lines, expected, strict=True):
        found = json.loads(line)
        assert found["index"] == int(row.argmax())
        assert found["class"] == f"class {found['index']}"  # Lightning's files have no names
        for top in found["top"]:
            assert top["probability"] == pytest.approx(float(row[top["index"]]), abs=1e-5)


def test_what_a_file_does_not_tell_can_be_said(tmp_path):
    """The probability changes with the scale of the pooling, which no file tells."""
    photo = write_image(arrays("finetuned")["image_rgb"][0], tmp_path / "photo.png")
    found = []
    for words in ([], ["--model-arg", "pool_scale=0.25"]):
        model = ["--model", str(WHOLE / "finetuned.ckpt"), *words]
        out = tmp_path / f"{len(found)}"
        assert main(["predict", photo, *model, "--out", str(out)]) == 0
        found.append(json.loads((out / "predictions.jsonl").read_text())["probability"])
    assert found[0] != found[1]


def test_reconstruct(tmp_path):
    photo = write_image(arrays("mae")["image_rgb"][0], tmp_path / "photo.png")
    words = ["--model", str(WHOLE / "mae.ckpt"), photo, "--out", str(tmp_path)]
    assert main(["reconstruct", *words]) == 0
    assert (tmp_path / "photo_reconstruction.png").is_file()


def test_channels_have_numbers_for_names(tmp_path):
    image = np.random.default_rng(0).integers(0, 255, (8, 64, 64), dtype=np.uint8)
    np.save(tmp_path / "cells.npy", image)
    words = ["--model", str(WHOLE / "channels.ckpt"), "--out", str(tmp_path)]
    assert main(["predict", str(tmp_path / "cells.npy"), *words]) == 0
    found = json.loads((tmp_path / "predictions.jsonl").read_text())
    assert found["class"] == f"class {found['index']}"
    assert (tmp_path / "predictions.png").is_file()
