"""`fastvim segment`, as a person calls it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from fastvim.data.dense_data import prepare_scene
from fastvim.models import FastVim, FeatureMaps, create_model
from fastvim.models.heads.sliding import multi_scale_flip, sliding_window
from fastvim.models.heads.upernet import UPerNet
from fastvim.weights import load_model, save
from fastvim_cli import main

MODEL = "fastvim_tiny_patch16_224"
ARGS = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2}
HEAD = {"num_classes": 3, "out_indices": [0, 1], "source": "mixer"}
HEAD |= {"channels": 12, "aux_channels": 8, "window": 32, "stride": 24}
IMAGES = {"img_size": 32, "mean": [0.5] * 3, "std": [0.2] * 3, "base_size": [64, 48]}
NAMES = ["background", "cat", "dog"]


def blocks() -> Image.Image:
    """Soft spots of many colours, 130 by 90 pixels."""
    pixels = np.random.default_rng(0).integers(0, 256, (9, 13, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((130, 90), Image.Resampling.BICUBIC)


def write(path, **metadata) -> None:
    """Weights that find all classes in those spots."""
    torch.manual_seed(3)
    backbone = create_model(MODEL, **ARGS)
    assert isinstance(backbone, FastVim)
    maps = FeatureMaps(backbone, HEAD["out_indices"])
    model = UPerNet(maps, num_classes=3, channels=12, aux_channels=8)
    nn.init.normal_(model.head.classifier.weight, std=1.0)
    prepared = prepare_scene(blocks(), None, IMAGES["mean"], IMAGES["std"])
    with torch.no_grad():
        model.head.classifier.bias -= model.eval()(prepared[None]).mean((0, 2, 3))
    told = {"model": MODEL, "model_args": ARGS, "segmentation": HEAD, "class_names": NAMES}
    save(path, model.state_dict(), {**told, **IMAGES, **metadata})


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "segmenter.safetensors"
    write(path)
    return path


@pytest.fixture
def photo(tmp_path):
    blocks().save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def segment(weights, *words) -> int:
    return main(["segment", str(weights), *map(str, words)])


def indices(out, stem: str = "photo") -> np.ndarray:
    with Image.open(out / f"{stem}_classes.png") as image:
        assert image.mode == "P"
        return np.asarray(image)


def expected(weights, photo, base_size, **options) -> np.ndarray:
    """The classes as the test of a task finds them."""
    model, _ = load_model(path=weights)
    model.eval()
    image = Image.open(photo)
    prepared = prepare_scene(image, base_size, [0.5] * 3, [0.2] * 3)[None]

    def windows(version):
        return sliding_window(model, version, options.get("window", 32), options.get("stride", 24))

    told = {name: options[name] for name in ("scales", "flip") if name in options}
    with torch.no_grad():
        scores = multi_scale_flip(windows, prepared, (image.height, image.width), **told)
    return scores[0].argmax(dim=0).numpy()


@pytest.mark.parametrize(
    ("words", "options"),
    [
        ([], {}),
        (["--flip", "--scales", "0.75", "1.5"], {"flip": True, "scales": (0.75, 1.5)}),
        (["--window", "48"], {"window": 48, "stride": 32}),
        (["--window", "48", "--stride", "16"], {"window": 48, "stride": 16}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_it_is_what_the_test_of_a_task_predicts(weights, photo, tmp_path, words, options, capsys):
    out = tmp_path / "out"
    assert segment(weights, photo, "--out", out, *words) == 0
    classes = indices(out)
    assert classes.shape == (90, 130)
    assert len(np.unique(classes)) == 3
    assert np.array_equal(classes, expected(weights, photo, (64, 48), **options))
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{photo}: ")
    assert line.endswith(f"drawn in {out}/photo_overlay.png")
    for index, name in enumerate(NAMES):
        assert f"{name} {(classes == index).mean():.1%}" in line


def test_images_may_keep_their_size(photo, tmp_path):
    write(tmp_path / "own.safetensors", base_size=None)
    assert segment(tmp_path / "own.safetensors", photo, "--out", tmp_path) == 0
    own = expected(tmp_path / "own.safetensors", photo, None)
    assert np.array_equal(indices(tmp_path), own)
    assert not np.array_equal(own, expected(tmp_path / "own.safetensors", photo, (64, 48)))


def test_images_of_any_size_and_kind(weights, tmp_path):
    sizes = {"dot": (1, 1), "strip": (400, 3), "tower": (5, 200), "small": (20, 24)}
    for name, size in sizes.items():
        Image.new("L", size, 90).save(tmp_path / f"{name}.png")
    assert segment(weights, tmp_path, "--out", tmp_path / "out") == 0
    for name, (width, height) in sizes.items():
        assert indices(tmp_path / "out", name).shape == (height, width)
    assert len(list((tmp_path / "out").glob("*.png"))) == 2 * len(sizes)


def test_the_picture_shows_the_image_and_its_classes(weights, photo, tmp_path):
    assert segment(weights, photo, "--out", tmp_path) == 0
    with Image.open(tmp_path / "photo_overlay.png") as picture:
        pixels = np.asarray(picture)
    image = np.asarray(Image.open(photo)).repeat(3, 0).repeat(3, 1)  # 130 pixels by three
    top, left = 14 + 14 + 8, 14
    assert np.array_equal(pixels[top : top + 270, left : left + 390], image)
    drawn = pixels[top : top + 270, left + 390 + 8 :][:, :390]
    background = (indices(tmp_path) == 0).repeat(3, 0).repeat(3, 1)
    assert np.array_equal(drawn[background], image[background])
    assert (drawn[~background] != image[~background]).any(-1).mean() > 0.95


def test_photographs_are_upright_and_names_are_free(weights, photo, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: to be shown a quarter turn clockwise
    (tmp_path / "turned").mkdir()
    turned = tmp_path / "turned" / "photo.png"
    Image.fromarray(np.rot90(np.asarray(Image.open(photo)))).save(turned, exif=exif)
    out = tmp_path / "out"
    assert segment(weights, photo, turned, "--out", out) == 0
    assert np.array_equal(indices(out), indices(out, "photo-2"))


def test_the_rest_is_drawn(weights, photo, tmp_path, capsys):
    (tmp_path / "notes.jpg").write_text("not an image")
    (tmp_path / "cut.png").write_bytes(photo.read_bytes()[:300])
    sources = [tmp_path / "notes.jpg", photo, tmp_path / "cut.png", tmp_path / "none.png"]
    assert segment(weights, *sources, "--out", tmp_path / "out") == 0
    errors = capsys.readouterr().err
    for line in (
        "notes.jpg: unreadable image (of no format",
        "cut.png: unreadable image",
        "none.png: no such file",
    ):
        assert line in errors
    assert len(list((tmp_path / "out").glob("*.png"))) == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "IMAGES"),
        (["WEIGHTS"], "expected IMAGES after the weights"),
        (["none.ckpt", "PHOTO"], "no checkpoint at none.ckpt"),
        (["WEIGHTS", "none.png"], "no image among 1 files"),
        (["WEIGHTS", "PHOTO", "--scales", "0"], "--scales: 0: expected factors above 0"),
        (["WEIGHTS", "PHOTO", "--window", "0"], "--window: 0: expected 1 to 65536"),
        (["WEIGHTS", "PHOTO", "--stride", "33"], "stride 33: expected at least 1 and at most"),
        (["WEIGHTS", "PHOTO", "--device", "gpu"], "--device gpu"),
        (["UNTOLD", "PHOTO"], "does not say base_size: expected weights of fastvim fit"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_one_line(weights, photo, tmp_path, capsys, words, message):
    known = {"WEIGHTS": weights, "PHOTO": photo}
    known["UNTOLD"] = tmp_path / "untold.safetensors"
    model, metadata = load_model(path=weights)
    del metadata["base_size"]
    save(known["UNTOLD"], model.state_dict(), metadata)
    assert main(["segment", *(str(known.get(word, word)) for word in words)]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("fastvim:")]
    assert len(errors) == 1
    assert message in errors[0]


def test_a_trained_segmentor_goes_to_published_names_and_back(weights, tmp_path):
    assert main(["convert", str(weights), str(tmp_path / "out.pth")]) == 0
    expected, metadata = load_model(path=weights)
    found, again = load_model(path=tmp_path / "out.pth")
    for key in ("segmentation", "class_names", "mean", "std"):
        assert again[key] == metadata[key]
    for name, tensor in expected.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor)
