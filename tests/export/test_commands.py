"""`fastvim export`, and commands that are given the file in the place of the weights."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from exported_families import FAMILIES
from PIL import Image
from small_weights import write_detector

from fastvim.weights import save
from fastvim_cli import main

pytest.importorskip("onnxscript")
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Weights of the families, and what `fastvim export` makes of them, by name."""
    folder = tmp_path_factory.mktemp("exported")

    def make(family: str) -> tuple[Path, Path]:
        weights, exported = folder / f"{family}.safetensors", folder / f"{family}.onnx"
        if not exported.exists():
            model, metadata = FAMILIES[family]()
            save(weights, model.state_dict(), {**metadata, "licence": "CC0-1.0"})
            assert main(["export", "--model", str(weights), str(exported)]) == 0
        return weights, exported

    return make


@pytest.fixture
def photos(tmp_path):
    """Three pictures of different sizes."""
    generator = np.random.default_rng(0)
    for i, size in enumerate([(40, 30), (33, 70), (64, 64)]):
        pixels = generator.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).resize(size).save(tmp_path / f"{i}.png")
    return tmp_path


def rows(command, model, photos, out):
    assert main([command, "--model", str(model), "--out", str(out), str(photos)]) == 0
    return [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_predict_gives_the_same_rows(files, photos, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    wanted, found = (
        rows("predict", model, photos, out / model.suffix[1:]) for model in files("fastvim")
    )
    assert len(found) == 3
    for want, got in zip(wanted, found, strict=True):
        assert (got["file"], got["class"]) == (want["file"], want["class"])
        for a, b in zip(want["top"], got["top"], strict=True):
            assert b["probability"] == pytest.approx(a["probability"], abs=1e-4)


@pytest.mark.slow
def test_predict_of_a_channel_model(files, tmp_path, tmp_path_factory):
    generator, out = np.random.default_rng(0), tmp_path_factory.mktemp("out")
    for i in range(2):
        np.save(tmp_path / f"{i}.npy", generator.integers(0, 255, (5, 40, 30), dtype=np.uint8))
    wanted, found = (
        rows("predict", model, tmp_path, out / model.suffix[1:]) for model in files("channels")
    )
    for want, got in zip(wanted, found, strict=True):
        assert got["probability"] == pytest.approx(want["probability"], abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "family"), [("segment", "segmentor"), ("reconstruct", "autoencoder")]
)
def test_pictures_are_the_same(command, family, files, photos, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    drawn = []
    for model in files(family):
        folder = out / model.suffix[1:]
        assert main([command, "--model", str(model), "--out", str(folder), str(photos)]) == 0
        drawn.append({file.name: np.array(Image.open(file)) for file in folder.rglob("*.png")})
    assert drawn[0]
    assert drawn[0].keys() == drawn[1].keys()
    for name, picture in drawn[0].items():
        # A pixel between two values or two classes may fall to the other side.
        differs = picture.astype(int) - drawn[1][name]
        assert (np.abs(differs) > 1).mean() < 0.001, name


def refused(capsys, *arguments) -> str:
    """The one line of a command that ends with code 2."""
    assert main([str(argument) for argument in arguments]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


def test_what_is_not_run(files, photos, tmp_path, capsys):
    _, exported = files("fastvim")
    capsys.readouterr()
    program = tmp_path / "model.aoti.pt2"
    program.write_bytes(b"PK")
    line = refused(capsys, "predict", "--model", program, photos)
    assert "may hold code" in line
    line = refused(capsys, "predict", "--model", exported, "--model-arg", "pool_scale=1", photos)
    assert "takes no other name, --model-arg" in line
    line = refused(capsys, "segment", "--model", exported, photos)
    assert "is a classifier: see fastvim predict" in line
    line = refused(capsys, "export", "--model", exported, tmp_path / "again.onnx")
    assert "expected weights" in line
    line = refused(capsys, "predict", "--model", tmp_path / "none.onnx", photos)
    assert "none.onnx cannot be read: No such file" in line


def damage(file, **changes):
    told = {each.key: each for each in file.metadata_props}["fastvim"]
    told.value = json.dumps({**json.loads(told.value), **changes})


def test_damaged_and_hostile_files(files, photos, tmp_path, capsys):
    _, exported = files("fastvim")
    capsys.readouterr()
    content, bad = exported.read_bytes(), tmp_path / "bad.onnx"

    def line_of(changed: bytes) -> str:
        bad.write_bytes(changed)
        return refused(capsys, "predict", "--model", bad, photos)

    for end in (0, 100, len(content) // 2):
        assert "bad.onnx" in line_of(content[:end])
    assert "damaged or not of ONNX" in line_of(b"\xff" * 100)

    file = onnx.load_model_from_string(content)
    del file.metadata_props[:]
    assert "was not written by fastvim export" in line_of(file.SerializeToString())

    file = onnx.load_model_from_string(content)
    damage(file, model="resnet50")
    assert "its metadata" in line_of(file.SerializeToString())
    file = onnx.load_model_from_string(content)
    damage(file, model="fastvim_small_patch16_224", model_args={"num_classes": 7})
    assert "gives [3, 4], expected [3, 7]" in line_of(file.SerializeToString())

    secret = tmp_path.parent / "secret"
    secret.write_bytes(bytes(1 << 16))
    file = onnx.load_model_from_string(content)
    tensor = max(file.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../secret")
    assert "keeps its weights in other files" in line_of(file.SerializeToString())


def test_a_detector(tmp_path, capsys):
    write_detector(tmp_path / "detector.safetensors")
    line = refused(
        capsys, "export", "--model", tmp_path / "detector.safetensors", tmp_path / "m.onnx"
    )
    assert "a detector is not exported" in line
    assert "fastvim convert --backbone" in line
    assert not (tmp_path / "m.onnx").exists()


def test_fixed_sizes_need_to_be_said(tmp_path, capsys):
    assert "expected --fixed" in refused(capsys, "export", tmp_path / "m.onnx", "--size", 32, 32)


@pytest.mark.slow
def test_a_result_that_is_not_finite(tmp_path, capsys):
    model, metadata = FAMILIES["fastvim"]()
    with torch.no_grad():
        model.head.bias.fill_(3e38)
        model.head.weight.fill_(1e38)
    weights, target = tmp_path / "huge.safetensors", tmp_path / "m.pt2"
    save(weights, model.state_dict(), metadata)
    assert main(["export", "--model", str(weights), str(target)]) == 1
    assert "is not written" in capsys.readouterr().err
    assert not target.exists()
