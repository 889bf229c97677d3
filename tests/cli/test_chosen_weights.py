"""`--model NAME_OR_FILE` and what goes with it, the same in every command that needs a model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import small_weights
import timm
import torch
from PIL import Image

from fastvim.weights import read, save
from fastvim_cli import main

WRITERS = {
    "predict": small_weights.write_classifier,
    "reconstruct": small_weights.write_autoencoder,
    "segment": small_weights.write_segmenter,
    "detect": small_weights.write_detector,
    "channels": small_weights.write_channel_model,
}
WHOLE = Path(__file__).parents[1] / "golden" / "whole"  # published files
KINDS = {
    "predict": "a classifier",
    "reconstruct": "a masked autoencoder",
    "segment": "a segmentor",
    "detect": "a detector",
    "channels": "a channel model",
}
DRAWN = {
    "predict": "predictions.png",
    "reconstruct": "photo_reconstruction.png",
    "segment": "photo_overlay.png",
    "detect": "photo_detections.png",
}


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A photograph, and weights for every command."""
    home = tmp_path_factory.mktemp("home")
    Image.linear_gradient("L").convert("RGB").save(home / "photo.png")
    for command, write in WRITERS.items():
        torch.manual_seed(0)
        write(home / f"{command}.safetensors")
    return home


def one_line(capsys) -> str:
    (line,) = (x for x in capsys.readouterr().err.splitlines() if x.startswith("fastvim: error"))
    return line


@pytest.mark.parametrize("command", DRAWN)
def test_a_file_of_weights(command, home, tmp_path):
    weights, photo = str(home / f"{command}.safetensors"), str(home / "photo.png")
    out = ["--out", str(tmp_path)]
    calls = [["--model", weights, photo]]
    if command in ("predict", "reconstruct"):
        calls.append(["--checkpoint", weights, photo])
    else:
        calls.append([weights, photo])
    pictures = []
    for words in calls:
        assert main([command, *words, *out]) == 0
        pictures.append((tmp_path / DRAWN[command]).read_bytes())
    assert pictures[0] == pictures[1]


@pytest.mark.parametrize("command", DRAWN)
@pytest.mark.parametrize("other", KINDS)
def test_weights_for_another_command(command, other, home, tmp_path, capsys):
    if command == other or (command, other) == ("predict", "channels"):
        return
    weights = home / f"{other}.safetensors"
    words = ["--model", str(weights), str(home / "photo.png"), "--out", str(tmp_path)]
    assert main([command, *words]) == 2
    fits = "predict" if other == "channels" else other
    assert one_line(capsys).endswith(f"{weights} is {KINDS[other]}: see fastvim {fits}")
    assert not list(tmp_path.iterdir())


def test_a_file_goes_into_the_named_model(home, tmp_path, capsys):
    """A bare state dict does not say what it is of, nor that it pools by maxima."""
    torch.manual_seed(0)
    model = timm.create_model("fastvim_tiny_patch16_224", **small_weights.SMALL, num_classes=3)
    bare = tmp_path / "bare.safetensors"
    save(bare, model.state_dict(), {})
    options = [f"--model-arg={name}={value}" for name, value in small_weights.SMALL.items()]
    options.append("--model-arg=num_classes=3")
    words = ["--model", "fastvim_tiny_patch16_224", "--checkpoint", str(bare), *options]
    found = []
    for pooling in ("mean", "max"):
        more = [f"--model-arg=pooling={pooling}", "--out", str(tmp_path / pooling)]
        assert main(["predict", *words, *more, str(home / "photo.png")]) == 0
        text = (tmp_path / pooling / "predictions.jsonl").read_text()
        found.append(json.loads(text)["probability"])
    assert found[0] != found[1]


def test_raw_weights(tmp_path, home):
    torch.manual_seed(0)
    options = {**small_weights.SMALL, "num_classes": 3}
    averaged, raw = (
        timm.create_model("fastvim_tiny_patch16_224", **options).state_dict() for _ in "ab"
    )
    told = {"model": "fastvim_tiny_patch16_224", "model_args": options}
    both = tmp_path / "last.ckpt"
    torch.save(
        {
            "state_dict": averaged,
            "current_model_state": raw,
            "averaging_state": {},
            "fastvim": told,
        },
        both,
    )
    for name, words, expected in (("ema", [], averaged), ("raw", ["--raw"], raw)):
        save(tmp_path / f"{name}.safetensors", expected, told)
        pair = []
        for weights in (both, tmp_path / f"{name}.safetensors"):
            out = tmp_path / f"{name} {weights.name}"
            call = ["--model", weights, home / "photo.png", "--out", out]
            assert main(["predict", *map(str, call), *words]) == 0
            pair.append(json.loads((out / "predictions.jsonl").read_text())["probability"])
        assert pair[0] == pair[1]
    assert read(both).weights == "EMA"


def test_a_name_without_published_weights(home, caplog):
    options = [f"--model-arg={name}={value}" for name, value in small_weights.SMALL.items()]
    name = "fastvim_large_patch16_224"
    assert main(["predict", "--model", name, *options, str(home / "photo.png")]) == 0
    assert f"{name} has no published weights" in caplog.text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["segment", "SEGMENT", "--model", "DETECT", "PHOTO"], "expected one model"),
        (["detect", "DETECT"], "expected IMAGES after the weights"),
        (
            ["predict", "--model", "PREDICT", "--checkpoint", "DETECT", "PHOTO"],
            "expected one file of weights",
        ),
        (["predict", "--model-arg", "pool_scale", "PHOTO"], "pool_scale: expected OPTION=VALUE"),
        (["predict", "--model-arg", "path=x", "PHOTO"], "path=x: expected OPTION=VALUE"),
        (["predict", "--model-arg", "alternate=False", "PHOTO"], "expected true, false or null"),
        (["predict", "--model", "PREDICT", "--model-arg", "deph=2", "PHOTO"], "deph"),
        (
            ["predict", "--model", "PREDICT", "--model-arg", "depth=two", "PHOTO"],
            "depth 'two': expected 1 or more",
        ),
        (["segment", "SCENES", "PHOTO", "--model-arg", "window=big"], "window='big': expected 1"),
        (["segment", "SCENES", "PHOTO", "--model-arg", "window=0"], "window=0: expected 1 or more"),
        (["segment", "SCENES", "PHOTO", "--model-arg", "base_size=5"], "base_size=5: expected the"),
        (["segment", "SCENES", "PHOTO", "--model-arg", "base_size=[0,5]"], "expected the longer"),
        (["segment", "SCENES", "PHOTO", "--model-arg", "out_indices=x"], "expected a list"),
        (["detect", "OBJECTS", "PHOTO", "--model-arg", "eval_size=x"], "eval_size='x': expected 1"),
        (["segment", "--model", "upernet_fastvim_smal", "PHOTO"], "upernet_fastvim_small"),
        (["detect", "--model", "nothing.pth", "PHOTO"], "no checkpoint at nothing.pth"),
        (["detect", "--model", "/", "PHOTO"], "it is a folder, expected a file"),
        (["detect", "--model", "", "PHOTO"], "expected a name or a file"),
        (["predict", "--model", "PREDICT", "--model", "SCENES", "PHOTO"], "expected one"),
        (["segment", "SCENES", "PHOTO", "--scales", "nan"], "nan: expected factors above 0"),
        (["segment", "SCENES", "PHOTO", "--scales", "x"], "x: expected factors above 0"),
        (["detect", "OBJECTS", "PHOTO", "--score", "x"], "x: expected 0 to 1"),
        (
            ["segment", "SCENES", "PHOTO", "--model-arg", "window=null", "--stride", "9"],
            "--stride: this model sees whole images",
        ),
        (["predict", "nowhere.jpg"], "no image among 1 files"),
        (["segment", "nowhere.jpg"], "no image among 1 files"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_one_line(words, message, home, capsys):
    known = {command.upper(): str(home / f"{command}.safetensors") for command in WRITERS}
    known["PHOTO"] = str(home / "photo.png")
    known |= {"SCENES": str(WHOLE / "segmentor.pth"), "OBJECTS": str(WHOLE / "detector.pth")}
    assert main([known.get(word, word) for word in words]) == 2
    assert message in one_line(capsys)
