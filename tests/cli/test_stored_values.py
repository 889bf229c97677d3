"""Every command on images gives the same for one picture, however a file stores it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import small_weights
from PIL import Image

from fastvim.models import create_model
from fastvim.weights import convert, read, save
from fastvim_cli import main


def write_classifier(path: Path) -> None:
    options = {**small_weights.SMALL, "num_classes": 3}
    state = create_model(small_weights.TINY, **options).state_dict()
    save(path, state, {"model": small_weights.TINY, "model_args": options})


WRITERS: dict[str, Callable[[Path], None]] = {
    "predict": write_classifier,
    "reconstruct": small_weights.write_autoencoder,
    "segment": small_weights.write_segmenter,
    "detect": small_weights.write_detector,
}
RANGE = [0, 4080]  # of a camera of 12 bits
GREY = (np.random.default_rng(0).integers(0, 52, (8, 12)) * 5).repeat(4, 0).repeat(4, 1)


@pytest.fixture
def weights(tmp_path: Path) -> Callable[[str, list[int] | None], Path]:
    """Weights of a command, with the range of the values that they were trained with."""

    def write(command: str, value_range: list[int] | None) -> Path:
        path = tmp_path / "weights.safetensors"
        WRITERS[command](path)
        found = read(path)
        save(path, found.state, {**found.metadata, "value_range": value_range})
        return path

    return write


def result(command: str, weights: Path, image: Path, out: Path, *words: str) -> object:
    """What a command writes of an image, without the name of its file."""
    arguments = [command, "--model", weights, *words, "--out", out, image]
    assert main([str(word) for word in arguments]) == 0
    if command == "predict":
        return json.loads((out / "predictions.jsonl").read_text())["top"]
    if command == "detect":
        found = json.loads((out / "detections.json").read_text())
        return [{k: v for k, v in each.items() if k != "file_name"} for each in found]
    name = {"segment": "classes", "reconstruct": "reconstruction"}[command]
    return (out / f"1_{name}.png").read_bytes()


def as_stored(folder: Path, kind: str) -> Path:
    """The picture in a file named 1."""
    grey = GREY.astype(np.uint8)
    folder.mkdir()
    if kind == "turned":
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.fromarray(np.rot90(grey)).save(folder / "1.png", exif=exif)
    elif kind == "8 bits":
        Image.fromarray(grey).save(folder / "1.png")
    elif kind == "16 bits":
        Image.fromarray(GREY.astype(np.uint16) * 257).save(folder / "1.png")
    elif kind == "12 bits":
        Image.fromarray(GREY.astype(np.uint16) * 16).save(folder / "1.png")
    elif kind == "float":
        Image.fromarray(GREY.astype(np.float32) * 16).save(folder / "1.tif")
    return next(folder.iterdir())


@pytest.mark.parametrize("command", WRITERS)
def test_the_same_however_it_is_stored(command, weights, tmp_path, capsys):
    path = weights(command, None)
    expected = result(command, path, as_stored(tmp_path / "in8", "8 bits"), tmp_path / "out8")
    for number, kind in enumerate(("16 bits", "turned")):
        image = as_stored(tmp_path / f"in{number}", kind)
        assert result(command, path, image, tmp_path / f"out{number}") == expected
    words = ("--value-range", "0", "4080")
    twelve = as_stored(tmp_path / "in12", "12 bits")
    assert result(command, path, twelve, tmp_path / "out12", *words) == expected
    assert not capsys.readouterr().err
    assert result(command, path, twelve, tmp_path / "dark") != expected
    assert "less than a quarter of 65535" in (error := capsys.readouterr().err)
    assert "--value-range" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("command", WRITERS)
def test_the_range_of_the_training_is_used(command, weights, tmp_path, capsys):
    path = weights(command, RANGE)
    expected = result(command, path, as_stored(tmp_path / "in8", "8 bits"), tmp_path / "out8")
    for number, kind in enumerate(("12 bits", "float")):
        image = as_stored(tmp_path / f"in{number}", kind)
        assert result(command, path, image, tmp_path / f"out{number}") == expected
    assert not capsys.readouterr().err


@pytest.mark.parametrize("command", WRITERS)
def test_what_is_refused_and_why(command, weights, tmp_path, capsys):
    path = weights(command, None)
    image = as_stored(tmp_path / "in", "float")
    assert main([command, "--model", str(path), "--out", str(tmp_path / "out"), str(image)]) == 2
    assert "float32 values 0 to 4080; expected value_range" in capsys.readouterr().err
    words = ["--max-pixels", "100", "--out", str(tmp_path / "out")]
    assert main([command, "--model", str(path), *words, str(image)]) == 2
    error = capsys.readouterr().err
    assert "too large, 48x32 = 1,536 pixels; expected at most max_pixels 100" in error
    assert "damaged" not in error


def test_a_published_file_cannot_say_the_range(weights, tmp_path, caplog):
    convert(weights("segment", RANGE), tmp_path / "published.ckpt")
    assert "cannot say value_range [0, 4080]" in caplog.text


def test_a_channel_model_has_no_range(tmp_path, capsys):
    small_weights.write_channel_model(tmp_path / "weights.safetensors")
    np.save(tmp_path / "1.npy", np.zeros((8, 32, 32), dtype=np.uint8))
    words = ["--model", "weights.safetensors", "--value-range", "0", "1", "1.npy"]
    words = [str(tmp_path / word) if "." in word else word for word in words]
    assert main(["predict", *words]) == 2
    assert "value_range: a channel model takes the values as stored" in capsys.readouterr().err


RECIPE = """\
model:
  class_path: fastvim.tasks.Classification
  init_args:
    model: fastvim_tiny_patch16_224
    model_args: {img_size: 32, patch_size: 8, embed_dim: 16, depth: 2}
    warmup_epochs: 0
data:
  class_path: fastvim.data.images.ImageData
  init_args: {root: ROOT, img_size: 32, batch_size: 2, num_workers: 0}
trainer: {accelerator: cpu, max_epochs: 1, default_root_dir: RUN, logger: false}
"""


def test_a_run_stores_the_range_and_trains_alike(tmp_path, caplog):
    """The same run on 8 bits, and on 12 bits with their range: the same weights."""
    trained = []
    for kind in ("8 bits", "12 bits"):
        root, run = tmp_path / kind, tmp_path / f"run {kind}"
        for split in ("train", "val"):
            for name in ("ant", "bee"):
                folder = root / split / name
                folder.parent.mkdir(parents=True, exist_ok=True)
                as_stored(folder, kind)
        recipe = tmp_path / f"{kind}.yaml"
        recipe.write_text(RECIPE.replace("ROOT", str(root)).replace("RUN", str(run)))
        words = ["--data.value_range=[0, 4080]"] if kind == "12 bits" else []
        assert main(["fit", "--config", str(recipe), *words]) == 0
        trained.append(read(run / "model.safetensors"))
    eight, twelve = trained
    assert eight.metadata["value_range"] is None
    assert twelve.metadata["value_range"] == [0, 4080]
    for name, weight in eight.state.items():
        assert weight.equal(twelve.state[name]), name

    recipe = str(tmp_path / "12 bits.yaml")
    for words, told in (([], True), (["--data.value_range=[0, 4080]"], False)):
        caplog.clear()
        assert main(["test", "--config", recipe, "--ckpt_path", "last", *words]) == 0
        assert ("trained with value_range (0" in caplog.text) == told


def test_a_detector_trained_on_images_as_stored_reads_them_so(tmp_path: Path) -> None:
    weights, image = tmp_path / "weights.safetensors", tmp_path / "1.png"
    small_weights.write_detector(weights)
    found = read(weights)
    exif = Image.Exif()
    exif[0x0112] = 6
    grey = np.asarray(GREY, dtype=np.uint8)
    results = []
    cases = (
        ("stored", {"exif": exif}),
        ("stored", {}),
        (None, {"exif": exif}),
    )
    for number, (orientation, options) in enumerate(cases):
        save(weights, found.state, {**found.metadata, "orientation": orientation})
        Image.fromarray(grey).save(image, **options)
        results.append(result("detect", weights, image, tmp_path / f"{number}", "--score", "0"))
    as_stored, plain, upright = results
    assert as_stored == plain
    assert upright != plain
