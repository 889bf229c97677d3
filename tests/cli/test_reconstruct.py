"""`fastvim reconstruct`, as a person calls it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from fastvim.models import create_model
from fastvim.pictures.sheet import GAP, MARGIN, NOTE_SIZE, TEXT_SIZE
from fastvim.weights import save, to_published
from fastvim_cli import main

MODEL = "mae_fastvim_tiny_patch16_224"
SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 1, "decoder_embed_dim": 12}
CLASSIFIER = "fastvim_tiny_patch16_224"
CLASSIFIER_ARGS = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_classes": 3}


def write(path, *, name=MODEL, options=SMALL, **images):
    torch.manual_seed(0)
    model = create_model(name, **options)
    metadata = {"model": name, "model_args": options, **images}
    save(path, model.state_dict(), metadata)
    return model


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "mae.safetensors"
    write(path, img_size=32, crop_pct=1.0)
    return path


@pytest.fixture
def photo(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def panels(file, height, width) -> list[np.ndarray]:
    """The four panels of a picture of one image."""
    pixels, top = np.asarray(Image.open(file)), MARGIN + TEXT_SIZE + GAP
    lefts = [MARGIN + i * (width + GAP) for i in range(4)]
    return [pixels[top : top + height, left : left + width] for left in lefts]


def test_a_picture_for_each_image(weights, image_folder, tmp_path, capsys):
    val = image_folder / "val"
    sources = [val / "ant" / "0.jpg", val / "bee", val / "ant" / "0.jpg", val / "cat" / "0*.jpg"]
    arguments = ["--checkpoint", str(weights), "--out", str(tmp_path), *map(str, sources)]
    assert main(["reconstruct", *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    # Files of one name in several folders get a picture each.
    names = ["0", "0-2", *(str(i) for i in range(1, 6)), "0-3"]
    files = [tmp_path / f"{name}_reconstruction.png" for name in names]
    assert sorted(tmp_path.iterdir()) == sorted(files)
    assert len(lines) == len(files)
    for line, file in zip(lines, files, strict=True):
        assert line.startswith(str(val))
        assert line.endswith(f"drawn in {file}")
    assert lines[0].startswith(f"{sources[0]}: loss ")


def test_the_original_is_the_file_and_a_seed_gives_a_mask(weights, photo, tmp_path):
    def draw(*arguments) -> list[np.ndarray]:
        words = ["--checkpoint", weights, "--out", tmp_path, *arguments, photo]
        assert main(["reconstruct", *map(str, words)]) == 0
        return panels(tmp_path / "photo_reconstruction.png", 224, 224)

    original, masked, _, completed = draw()
    enlarged = np.asarray(Image.open(photo)).repeat(7, 0).repeat(7, 1)
    assert np.array_equal(original, enlarged)
    hidden = (masked == 128).all(-1)
    assert hidden.mean() == pytest.approx(0.75, abs=0.01)
    assert np.array_equal(masked[~hidden], enlarged[~hidden])
    assert np.array_equal(completed[~hidden], enlarged[~hidden])

    assert np.array_equal(draw()[1], masked)
    assert not np.array_equal(draw("--seed", 1)[1], masked)
    half = (draw("--mask-ratio", 0.5)[1] == 128).all(-1)
    assert half.mean() == pytest.approx(0.5, abs=0.01)


def test_a_mask_does_not_depend_on_the_other_images(weights, photo, image_folder, tmp_path):
    for out, sources in (("alone", [photo]), ("among", [image_folder / "val" / "ant", photo])):
        words = ["--checkpoint", weights, "--out", tmp_path / out, *sources]
        assert main(["reconstruct", *map(str, words)]) == 0
    alone, among = (tmp_path / out / "photo_reconstruction.png" for out in ("alone", "among"))
    assert alone.read_bytes() == among.read_bytes()


@pytest.mark.parametrize(
    ("names", "arguments", "height", "width"),
    [
        ("ours", [], 5 * 48, 5 * 32),
        ("ours", ["--size", "40"], 6 * 40, 6 * 40),
        ("published", [], 7 * 32, 7 * 32),
    ],
)
def test_the_size_is_the_trainings_or_the_given_one(
    names, arguments, height, width, photo, tmp_path
):
    path = tmp_path / ("mae.safetensors" if names == "ours" else "mae.ckpt")
    if names == "ours":
        write(path, img_size=(48, 32), mean=(0.5,), std=(0.2,))
    else:
        model = create_model(MODEL, **SMALL)
        torch.save({"state_dict": to_published(model.state_dict())}, path)
    words = ["--checkpoint", str(path), "--out", str(tmp_path), *arguments, str(photo)]
    assert main(["reconstruct", *words]) == 0
    with Image.open(tmp_path / "photo_reconstruction.png") as picture:
        assert picture.width == 4 * width + 3 * GAP + 2 * MARGIN
        assert picture.height == height + 2 * GAP + TEXT_SIZE + NOTE_SIZE + 2 * MARGIN


def test_a_grey_model(photo, tmp_path):
    path = tmp_path / "grey.safetensors"
    options = {**SMALL, "in_chans": 1, "norm_pix_loss": False}
    write(path, options=options, img_size=32, mean=[0.5], std=[0.5], crop_pct=1.0)
    words = ["--checkpoint", str(path), "--out", str(tmp_path), str(photo)]
    assert main(["reconstruct", *words]) == 0
    original = panels(tmp_path / "photo_reconstruction.png", 224, 224)[0]
    grey = np.asarray(Image.open(photo).convert("L")).repeat(7, 0).repeat(7, 1)
    assert np.array_equal(original, grey[..., None].repeat(3, -1))


def test_a_photograph_is_upright(weights, photo, tmp_path):
    pixels = np.asarray(Image.open(photo))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: to be shown a quarter turn clockwise
    Image.fromarray(np.rot90(pixels)).save(tmp_path / "turned.png", exif=exif)
    for name in ("photo", "turned"):
        words = ["--checkpoint", weights, "--out", tmp_path, tmp_path / f"{name}.png"]
        assert main(["reconstruct", *map(str, words)]) == 0
    upright, turned = (tmp_path / f"{n}_reconstruction.png" for n in ("photo", "turned"))
    assert upright.read_bytes() == turned.read_bytes()


def test_the_rest_is_drawn(weights, photo, tmp_path, capsys):
    (tmp_path / "notes.jpg").write_text("not an image")
    (tmp_path / "cut.png").write_bytes(photo.read_bytes()[:300])
    sources = [tmp_path / "notes.jpg", photo, tmp_path / "cut.png", tmp_path / "none.png"]
    out = tmp_path / "out"
    arguments = ["--checkpoint", str(weights), "--out", str(out), *map(str, sources)]
    assert main(["reconstruct", *arguments]) == 0
    errors = capsys.readouterr().err
    for line in (
        "notes.jpg: unreadable image (of no format",
        "cut.png: unreadable image",
        "none.png: no such file",
    ):
        assert line in errors
    assert [file.name for file in out.iterdir()] == ["photo_reconstruction.png"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a.png"], "no image among 1 files"),
        (["--checkpoint", "none.ckpt", "PHOTO"], "no checkpoint at none.ckpt"),
        (["--checkpoint", "WEIGHTS"], "IMAGES"),
        (["--checkpoint", "WEIGHTS", "none.png"], "no image among 1 files"),
        (["--checkpoint", "WEIGHTS", "--mask-ratio", "1", "a.png"], "--mask-ratio: 1: expected"),
        (["--checkpoint", "WEIGHTS", "--mask-ratio", "0.99", "PHOTO"], "keeps none of 16 patches"),
        (["--checkpoint", "WEIGHTS", "--size", "0", "a.png"], "--size: 0: expected 1 to 65536"),
        (["--checkpoint", "WEIGHTS", "--size", "4", "PHOTO"], "smaller than a patch"),
        (["--checkpoint", "WEIGHTS", "--model", CLASSIFIER, "PHOTO"], f"not of {CLASSIFIER}"),
        (["--checkpoint", "WEIGHTS", "--device", "gpu", "PHOTO"], "--device gpu"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_one_line(weights, photo, capsys, arguments, message):
    known = {"WEIGHTS": str(weights), "PHOTO": str(photo)}
    assert main(["reconstruct", *(known.get(word, word) for word in arguments)]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("fastvim:")]
    assert len(errors) == 1
    assert message in errors[0]
