"""Every file of the table and the folder of a run, in the libraries that can take them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import published_files as files
import pytest
import timm
import torch
import yaml
from hub_folders import PHOTOS, draw, folder_of, predicted
from PIL import Image
from timm.data import create_transform, resolve_model_data_config

import fastvim
from fastvim.export.programs import Sizes, program_of
from fastvim_cli import main

pytest.importorskip("onnxscript")
ort = pytest.importorskip("onnxruntime")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.clients

RECIPES = Path(__file__).parents[2] / "recipes"
DETECTORS = [name for name, entry in files.PUBLISHED.items() if entry.task == "detection"]
OTHERS = [name for name in files.PUBLISHED if name not in PHOTOS and name not in DETECTORS]


def exported(folder: Path):
    """A session of the file that `fastvim export` makes of a folder's weights."""
    target = str(folder / "model.onnx")
    assert main(["export", "--model", str(folder / "model.safetensors"), target]) == 0
    return ort.InferenceSession(target, providers=["CPUExecutionProvider"])


def by_timm(folder: Path) -> torch.nn.Module:
    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()


def assert_readers_agree(folder: Path, images: list[str], tmp_path: Path) -> None:
    """timm, transformers' pipeline and onnxruntime say what `fastvim predict` does."""
    model, session = by_timm(folder), exported(folder)
    prepare = create_transform(**resolve_model_data_config(model))
    classify = transformers.pipeline("image-classification", model=str(folder))
    names = model.pretrained_cfg.get("label_names") or range(model.num_classes)
    for path, expected in zip(images, predicted(folder, images, tmp_path / "out"), strict=True):
        with Image.open(path) as image, torch.no_grad():
            prepared = prepare(image)[None]
            logits = model(prepared)
        found = session.run(None, {"images": prepared.numpy()})[0]
        np.testing.assert_allclose(found, logits, atol=1e-5 * float(logits.abs().max()))
        said = {
            "timm": logits.softmax(-1)[0].tolist(),
            "onnxruntime": torch.from_numpy(found).softmax(-1)[0].tolist(),
        }
        by_class = {library: dict(zip(names, each, strict=True)) for library, each in said.items()}
        scores = classify(path, top_k=model.num_classes)
        by_class["transformers"] = {each["label"]: each["score"] for each in scores}
        for library, each in by_class.items():
            for name, probability in expected.items():
                assert each[name] == pytest.approx(probability, abs=1e-5), (library, name)


@pytest.mark.parametrize("name", PHOTOS)
def test_every_classifier_of_photos(name, tmp_path, monkeypatch):
    assert_readers_agree(folder_of(name, tmp_path, monkeypatch), draw(tmp_path), tmp_path)


def test_the_folder_of_the_quickstart(image_folder, tmp_path):
    """The recipe's own settings, with a smaller model, fewer epochs and other pictures."""
    recipe = yaml.safe_load((RECIPES / "quickstart.yaml").read_text())
    recipe["model"]["init_args"]["model_args"] |= {"embed_dim": 16, "depth": 2}
    recipe["model"]["init_args"]["warmup_epochs"] = 0
    recipe["data"]["init_args"] |= {"root": str(image_folder), "batch_size": 8}
    folder = tmp_path / "quickstart"
    recipe["trainer"] |= {"default_root_dir": str(folder), "max_epochs": 1}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["fit", "--config", str(tmp_path / "recipe.yaml")]) == 0
    assert_readers_agree(folder, draw(tmp_path, "L"), tmp_path)


@pytest.mark.parametrize("name", OTHERS)
def test_channel_models_autoencoders_and_segmentors(name, tmp_path, monkeypatch):
    """onnxruntime gives what the model does that timm loads, or this library a segmentor."""
    folder = folder_of(name, tmp_path, monkeypatch)
    if files.PUBLISHED[name].head:
        model, _ = fastvim.load_model(path=folder / "model.safetensors")
    else:
        model = by_timm(folder)
    program, session = program_of(model), exported(folder)
    sizes = Sizes(2, 3 * program.patch + 1, 5 * program.patch)
    inputs = program.make(sizes, torch.Generator().manual_seed(3), 1)
    with torch.no_grad():
        wanted = program.module(*inputs)
    named = {key: x.numpy() for key, x in zip(program.inputs, inputs, strict=True)}
    found = session.run(program.outputs, named)
    wanted = [wanted] if isinstance(wanted, torch.Tensor) else wanted
    for want, got in zip(wanted, found, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5 * float(want.abs().max()))


@pytest.mark.parametrize("name", DETECTORS)
def test_every_detector(name, tmp_path, monkeypatch):
    folder = folder_of(name, tmp_path, monkeypatch)
    model, metadata = fastvim.load_model(path=folder / "model.safetensors", pad_to=64)
    expected = files.weights(files.small(files.PUBLISHED[name], ""))
    found = model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    with torch.no_grad():
        (detections,) = model.eval()([torch.rand(3, 64, 96)])
    assert len(detections["boxes"]) == len(detections["scores"])
    assert metadata["class_names"] == files.OBJECTS
