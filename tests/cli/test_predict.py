"""`fastvim predict`, `convert` and `models`, as a person calls them."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from fastvim.inference.parts.sources import Source
from fastvim.models import create_model
from fastvim.registry import default_cfgs
from fastvim.weights import read, save, to_published
from fastvim_cli import main

NAMES = ["ant", "bee", "cat", "dog", "eel", "fox"]
MODEL = "fastvim_tiny_patch16_224"
SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_classes": 6}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return create_model(MODEL, **SMALL)


@pytest.fixture(scope="module")
def weights(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    metadata = {"model": MODEL, "model_args": SMALL, "class_names": NAMES, "img_size": 32}
    save(path, model.state_dict(), metadata)
    return path


def lines(folder):
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


def test_files_folders_and_globs(weights, image_folder, tmp_path, capsys):
    val = image_folder / "val"
    sources = [val / "ant" / "0.jpg", val / "bee", val / "cat" / "*.jpg", val / "bee" / "1.jpg"]
    arguments = ["--checkpoint", str(weights), "--out", str(tmp_path), *map(str, sources)]
    assert main(["predict", *arguments]) == 0
    written = lines(tmp_path)
    assert len(written) == 1 + 6 + 6  # a file named twice is predicted once
    for line in written:
        assert line["class"] == NAMES[line["index"]]
        assert line["probability"] == line["top"][0]["probability"]
        assert [entry["probability"] for entry in line["top"]] == sorted(
            (entry["probability"] for entry in line["top"]), reverse=True
        )
    assert written[0]["file"] == str(sources[0])
    assert (tmp_path / "predictions.png").read_bytes().startswith(b"\x89PNG")
    output = capsys.readouterr().out
    assert all(name in output for name in {line["class"] for line in written})


def test_images_of_many_channels(tmp_path, capsys):
    options = {**SMALL, "in_chans": 5}
    name = "fastchannelvim_small_patch16_224"
    torch.manual_seed(0)
    model = create_model(name, **options).eval()
    # A single value serves every channel.
    told = {"class_names": NAMES, "img_size": 32, "mean": [9.0], "std": [3.0] * 5}
    path = tmp_path / "model.safetensors"
    save(path, model.state_dict(), {"model": name, "model_args": options, **told})
    folder = tmp_path / "images"
    folder.mkdir()
    images = np.random.default_rng(0).integers(0, 20, (3, 5, 32, 32), dtype=np.uint8)
    for i, image in enumerate(images):
        np.save(folder / f"{i}.npy", image)
    (folder / "cut.npy").write_bytes((folder / "0.npy").read_bytes()[:100])
    np.save(folder / "few.npy", images[0, :3])
    out = tmp_path / "out"
    assert main(["predict", "--checkpoint", str(path), "--out", str(out), str(folder)]) == 0
    errors = capsys.readouterr().err
    assert "cut.npy: unreadable image" in errors
    assert "few.npy: shape (3, 32, 32); expected (5, height, width)" in errors
    with torch.no_grad():
        expected = model((torch.from_numpy(images).float() - 9) / 3).softmax(1)
    written = [line for line in lines(out) if "class" in line]
    assert [line["index"] for line in written] == expected.argmax(1).tolist()
    assert [line["probability"] for line in written] == pytest.approx(expected.amax(1).tolist())
    assert (out / "predictions.png").read_bytes().startswith(b"\x89PNG")


def test_predictions_are_the_models(weights, model, image_folder, tmp_path):
    from PIL import Image

    from fastvim.data.transforms import evaluation_transform

    path = image_folder / "val" / "ant" / "0.jpg"
    main(["predict", "--checkpoint", str(weights), "--out", str(tmp_path), str(path)])
    (line,) = lines(tmp_path)
    with Image.open(path) as image, torch.no_grad():
        pixels = evaluation_transform(img_size=32)(image)
        expected = model.eval()(pixels[None]).softmax(-1)[0]
    assert line["index"] == int(expected.argmax())
    assert line["probability"] == pytest.approx(float(expected.max()), abs=1e-5)


def test_converted_weights_get_images_of_their_size(model, image_folder, tmp_path):
    from PIL import Image

    from fastvim.data.transforms import evaluation_transform

    ours = tmp_path / "ours.safetensors"
    save(ours, model.state_dict(), {"model": MODEL, "model_args": SMALL})
    path = image_folder / "val" / "ant" / "0.jpg"
    main(["predict", "--checkpoint", str(ours), "--out", str(tmp_path), str(path)])
    (line,) = lines(tmp_path)
    with Image.open(path) as image, torch.no_grad():
        expected = model.eval()(evaluation_transform(img_size=32)(image)[None]).softmax(-1)[0]
    assert line["probability"] == pytest.approx(float(expected.max()), abs=1e-5)


def test_the_rest_is_predicted(weights, image_folder, tmp_path, capsys):
    good = image_folder / "val" / "ant" / "0.jpg"
    (tmp_path / "notes.jpg").write_text("not an image")
    (tmp_path / "cut.jpg").write_bytes(good.read_bytes()[:300])
    sources = [tmp_path / "notes.jpg", good, tmp_path / "cut.jpg", tmp_path / "none.png"]
    out = tmp_path / "out"
    arguments = ["--checkpoint", str(weights), "--out", str(out), *map(str, sources)]
    assert main(["predict", *arguments]) == 0
    errors = capsys.readouterr().err.replace("\n", " ")
    assert "notes.jpg: unreadable image (of no format" in errors
    assert "cut.jpg: unreadable image" in errors
    assert "none.png: no such file" in errors
    written = lines(out)
    assert [line["file"] for line in written if "class" in line] == [str(good)]
    assert len([line for line in written if "error" in line]) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "fastvim_tinny_patch16_224", "PHOTO"], "nearest: fastvim_tiny"),
        (["a.png"], "no image among 1 files"),
        (["--checkpoint", "none.safetensors", "PHOTO"], "no checkpoint at none.safetensors"),
        (["--model", MODEL, "none.png"], "no image among 1 files"),
        (["--model", MODEL, "--batch-size", "0", "a.png"], "--batch-size: 0"),
        (["--model", MODEL, "--device", "gpu", "PHOTO"], "--device gpu"),
        (["--model", MODEL], "IMAGES"),
    ],
)
def test_mistakes_are_one_line(arguments, message, image_folder, capsys):
    photo = str(image_folder / "val" / "ant" / "0.jpg")
    assert main(["predict", *(photo if word == "PHOTO" else word for word in arguments)]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("fastvim:")]
    assert len(errors) == 1
    assert message in errors[0]


def test_images_are_found_once(image_folder):
    folder = image_folder / "val" / "ant"
    words = (str(folder), str(folder / "0.jpg"), str(folder / "x*.jpg"))
    found = list(Source(words).items(None))
    assert [item.get("error") for item in found] == [None] * 6 + ["no such file"]


def test_convert_there_and_back(model, weights, tmp_path, capsys):
    published = tmp_path / "published.ckpt"
    state = {f"backbone.{name}": value for name, value in to_published(model.state_dict()).items()}
    averaged = {name: value + 1 for name, value in state.items()}
    torch.save({"state_dict": state, "state_dict_ema": averaged}, published)
    ours, back = tmp_path / "ours.safetensors", tmp_path / "back.ckpt"
    assert main(["convert", str(published), str(ours), "--img-size", "32"]) == 0
    output = capsys.readouterr().out
    assert "EMA weights" in output
    assert "embed_dim         16" in output
    assert main(["convert", str(ours), str(back)]) == 0
    again = read(back).state
    assert again.keys() == {name.removeprefix("backbone.") for name in state}
    assert all(torch.equal(again[n.removeprefix("backbone.")], v) for n, v in averaged.items())
    assert main(["convert", str(published), str(ours), "--img-size", "32", "--raw"]) == 0
    assert torch.equal(read(ours).state["head.weight"], model.head.weight)


def test_convert_mistakes(tmp_path, capsys):
    assert main(["convert", str(tmp_path / "none.ckpt"), str(tmp_path / "a.safetensors")]) == 2
    assert "no checkpoint at" in capsys.readouterr().err
    (tmp_path / "broken.ckpt").write_bytes(b"\x00" * 100)
    assert main(["convert", str(tmp_path / "broken.ckpt"), str(tmp_path / "a.safetensors")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_models_and_engines(capsys):
    assert main(["models"]) == 0
    output = capsys.readouterr().out
    assert "7,166,056" in output
    assert {line.split()[0] for line in output.splitlines()} == {"model", *default_cfgs}
    assert "705,817,164" in output
    assert main(["models", "--engines"]) == 0
    output = capsys.readouterr().out
    assert "selective_scan" in output
    assert "numba" in output
