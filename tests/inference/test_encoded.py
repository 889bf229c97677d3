"""Pictures decoded in batches for `fastvim predict`, beside those that Pillow reads."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastvim.data.pixels import PictureReader
from fastvim.data.transforms import evaluation_transform
from fastvim.errors import UserError
from fastvim.inference.classify import Classify
from fastvim.inference.encoded import EncodedPictures, decoded_in_batches
from fastvim.inference.inputs import Pictures
from fastvim.inference.models import ModelChoice
from fastvim.models import create_model
from fastvim.weights import save
from fastvim_cli import main

CPU = torch.device("cpu")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
MODEL = "fastvim_tiny_patch16_224"
SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_classes": 6}
ORIENTATION = 0x0112
LEVEL = 0.225 * 255  # of 8 bits, about


def picture(seed: int, wide: int, high: int) -> Image.Image:
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((wide, high))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """JPEG files of all shapes that lie on all sides, and what a GPU is not given."""
    folder = tmp_path_factory.mktemp("pictures")
    paths = []

    def add(image: Image.Image, name: str, **how: object) -> None:
        image.save(folder / name, **how)
        paths.append(str(folder / name))

    sizes = [(50, 37), (37, 50), (64, 64), (33, 90), (120, 36), (40, 40), (32, 200), (91, 55)]
    for number, size in enumerate(sizes):
        exif = Image.Exif()
        exif[ORIENTATION] = number + 1
        add(picture(number, *size), f"{number}.jpg", exif=exif, quality=90)
    add(picture(20, 60, 50), "progressive.jpg", progressive=True)
    add(picture(21, 60, 50).convert("L"), "grey.jpg")
    add(picture(22, 60, 50).convert("CMYK"), "printed.jpg")
    add(picture(23, 60, 50), "other.png")
    return paths


def broken(content: bytes) -> bytes:
    """A JPEG file whose header says what it is; its tables do not follow."""
    scan = content.index(b"\xff\xc4")
    return content[: scan + 4] + b"\xff" * (len(content) - scan - 6) + b"\xff\xd9"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", [32, (32, 48), (48, 32)])
@pytest.mark.parametrize(("interpolation", "crop_pct"), [("bicubic", 0.875), ("bilinear", 1.0)])
def test_images_are_those_of_pillow(
    files: list[str],
    interpolation: str,
    crop_pct: float,
    size: int | tuple[int, int],
    device: str,
) -> None:
    transform = evaluation_transform(size, crop_pct=crop_pct, interpolation=interpolation)
    alone = Pictures(PictureReader(), transform)
    pictures = Pictures(PictureReader(), transform.pixels)
    read = EncodedPictures(pictures)
    finish = decoded_in_batches("gpu", pictures, transform, torch.device(device))
    assert finish is not None
    images, errors = finish.each(read.batch([read(path) for path in files]), torch.device(device))
    assert not errors
    images = images.cpu()
    expected = torch.stack([alone(path) for path in files])
    tall = [3, 4]  # more than twice as high as wide: Pillow resizes the height first
    rest = [number for number in range(len(files)) if number not in tall]
    apart = (images - expected).abs() * LEVEL
    if device == "cpu":
        assert not apart[rest].any()
    assert apart.mean() < 0.05  # of a GPU's decoder too
    assert (apart > 1.5).float().mean() < 0.002


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    model = create_model(MODEL, **SMALL)
    told = {"model": MODEL, "model_args": SMALL, "class_names": list("abcdef"), "img_size": 32}
    save(path, model.state_dict(), told)
    return path


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("device", DEVICES)
def test_predictions_in_the_same_order_with_the_same_failures(
    files: list[str],
    weights: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    device: str,
) -> None:
    paths = list(files)
    for name, content in (
        ("broken.jpg", broken(Path(files[0]).read_bytes())),
        ("cut.jpg", Path(files[1]).read_bytes()[:300]),
        ("notes.jpg", b"not an image"),
        ("cut.png", Path(files[-1]).read_bytes()[:300]),
    ):
        (tmp_path / name).write_bytes(content)
        paths.insert(2, str(tmp_path / name))
    paths += [str(tmp_path / "broken.jpg")]
    (tmp_path / "list.txt").write_text("".join(f"{path}\n" for path in [*paths, "/no/such.jpg"]))
    found = []
    for decode, workers in (("cpu", "0"), ("gpu", "0"), ("gpu", "2"), ("auto", "0")):
        out = tmp_path / f"{decode}{workers}"
        words = ["--checkpoint", str(weights), "--list", str(tmp_path / "list.txt")]
        words += ["--part-size", "5", "--batch-size", "2", "--workers", workers]
        words += ["--device", device]
        assert main(["predict", *words, "--out", str(out), "--decode", decode]) == 0
        found.append(rows(out))
        if decode == "cpu":  # other pixels would be other rows
            assert main(["predict", *words, "--out", str(out), "--decode", "gpu"]) == 2
    expected = found[0]
    assert sum("error" in row for row in expected) == 6
    for rest in found[1:]:
        assert [row["file"] for row in rest] == [row["file"] for row in expected]
        assert [row.get("error") for row in rest] == [row.get("error") for row in expected]
        for row, other in zip(rest, expected, strict=True):
            if "error" not in row:
                limit = 1e-6 if device == "cpu" else 5e-3
                assert row["probability"] == pytest.approx(other["probability"], abs=limit)
    assert ("there is no GPU to decode on" in caplog.text) == (device == "cpu")


def test_large_images_are_decoded_in_turn(
    files: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    transform = evaluation_transform(32)
    (tmp_path / "broken.jpg").write_bytes(broken(Path(files[0]).read_bytes()))
    pictures = Pictures(PictureReader(), transform.pixels)
    read = EncodedPictures(pictures)
    paths = [*files[:3], str(tmp_path / "broken.jpg"), *files[3:]]
    batch = read.batch([read(path) for path in paths])
    finish = decoded_in_batches("gpu", pictures, transform, CPU)
    assert finish is not None
    whole, _ = finish.each(batch)
    for most in (1, 4000, 9000):
        monkeypatch.setattr("fastvim.data.gpu.finish.MOST_PIXELS", most)
        images, errors = finish.each(batch)
        assert torch.equal(images, whole)
        assert list(errors) == [3]


def test_a_batch_without_any_image(files: list[str], weights: Path, tmp_path: Path) -> None:
    for number in range(2):
        content = broken(Path(files[number]).read_bytes())
        (tmp_path / f"{number}.jpg").write_bytes(content)
    (tmp_path / "2.jpg").write_bytes(Path(files[0]).read_bytes())
    words = ["--checkpoint", str(weights), "--batch-size", "2", "--decode", "gpu", str(tmp_path)]
    words += ["--device", "cpu"]
    assert main(["predict", *words, "--out", str(tmp_path / "out")]) == 0
    errors = [row.get("error", "") for row in rows(tmp_path / "out")]
    assert [error.startswith("unreadable image (") for error in errors] == [True, True, False]


def test_what_cannot_be_is_refused(weights: Path, caplog: pytest.LogCaptureFixture) -> None:
    choice = ModelChoice(str(weights))
    with pytest.raises(UserError, match="decode 'gpu': expected cpu, as a value_range is given"):
        Classify(choice, value_range=(0, 200), decode="gpu").open(CPU)
    with pytest.raises(UserError, match="decode 'fast'"):
        Classify(choice, decode="fast")
    options = {**SMALL, "in_chans": 5}
    model = create_model("fastchannelvim_small_patch16_224", **options)
    told = {"img_size": 32, "mean": [9.0], "std": [3.0]}
    path = weights.with_name("channels.safetensors")
    name = {"model": "fastchannelvim_small_patch16_224", "model_args": options}
    save(path, model.state_dict(), {**name, **told})
    with pytest.raises(UserError, match="the model takes arrays"):
        Classify(ModelChoice(str(path)), decode="gpu").open(CPU)
    with caplog.at_level(logging.WARNING):
        Classify(ModelChoice(str(path)), decode="auto").open(CPU)
    assert not caplog.text  # without a GPU nothing is expected
