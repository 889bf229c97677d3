"""Pictures decoded in batches for `fastvim predict`, beside those that Pillow reads."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fastvim.data.gpu.files import Pixels, gather
from fastvim.data.gpu.finish import DecodeAndFinish
from fastvim.data.gpu.loading import resized_there
from fastvim.data.pixels import PictureReader
from fastvim.data.transforms import evaluation_transform
from fastvim.errors import UserError
from fastvim.inference.classify import Classify
from fastvim.inference.encoded import EncodedPictures, read_for_gpu
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


def for_gpu(decode: str, *known: Any) -> tuple[EncodedPictures, DecodeAndFinish]:
    found = read_for_gpu(decode, *known, batch_size=2)
    assert found is not None
    return found


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
    read, finish = for_gpu("gpu", pictures, transform, torch.device(device))
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
def formats(tmp_path_factory: pytest.TempPathFactory, files: list[str]) -> list[str]:
    """Those files, others that Pillow reads in other ways, and what it resizes by itself."""
    folder = tmp_path_factory.mktemp("formats")
    image, grey = picture(40, 80, 60), np.asarray(picture(41, 64, 50).convert("L"))
    clear = image.convert("RGBA")
    clear.putalpha(100)
    pictures = {
        "palette.png": image.quantize(32),
        "palette.gif": image.quantize(16),
        "clear.png": clear,
        "sixteen.png": Image.fromarray(grey.astype(np.uint16) * 16),
        "one.png": image.convert("1"),
        "grey.tif": Image.fromarray(grey),
        "narrow.png": picture(42, 3, 9),
        "line.png": picture(43, 150, 1),
        "column.png": picture(44, 1, 150),
        "large.png": picture(45, 130, 120),
    }
    for name, each in pictures.items():
        each.save(folder / name)
    return [*files, *(str(folder / name) for name in pictures)]


def resized_by(monkeypatch: pytest.MonkeyPatch, device: bool) -> None:
    """Whether the device resizes what Pillow decodes, whichever it is."""
    monkeypatch.setattr("fastvim.data.gpu.loading.has_kernels", lambda _: device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", [32, (32, 48)])
@pytest.mark.parametrize(("interpolation", "crop_pct"), [("bicubic", 0.875), ("box", 1.0)])
def test_what_pillow_decodes_is_resized_to_its_pixels(
    formats: list[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    interpolation: str,
    crop_pct: float,
    size: int | tuple[int, int],
    device: str,
) -> None:
    resized_by(monkeypatch, True)
    monkeypatch.setattr("fastvim.data.gpu.files.MOST_SENT", 12_000)
    transform = evaluation_transform(size, crop_pct=crop_pct, interpolation=interpolation)
    alone = Pictures(PictureReader(), transform)
    pictures = Pictures(PictureReader(), transform.pixels)
    read, finish = for_gpu("cpu", pictures, transform, torch.device(device))
    drawn = [read(path) for path in formats]
    assert not any(file.jpeg for file, _ in drawn)
    sent = {
        Path(path).name
        for path, (_, plan) in zip(formats, drawn, strict=True)
        if plan.box[2:] != plan.whole
    }
    assert {"0.jpg", "5.jpg", "grey.jpg", "palette.png", "line.png"} < sent
    assert not {"3.jpg", "4.jpg", "column.png", "large.png"} & sent
    images, errors = finish.each(read.batch(drawn), torch.device(device))
    assert not errors
    assert torch.equal(images.cpu(), torch.stack([alone(path) for path in formats]))
    assert (remarks := read.told().remarks)
    assert remarks == alone.told().remarks
    assert not caplog.text  # of no decoder that is missing


@settings(max_examples=60, deadline=None)
@given(
    width=st.integers(1, 150),
    shape=st.floats(0.2, 2.4),
    size=st.sampled_from([7, 33, (16, 48), (48, 31)]),
    interpolation=st.sampled_from(["bilinear", "bicubic", "hamming", "lanczos"]),
    crop_pct=st.sampled_from([0.5, 0.9, 1.0]),
)
def test_images_of_any_size(
    width: int, shape: float, size: Any, interpolation: str, crop_pct: float
) -> None:
    """Pillow of any version must not begin with the other axis."""
    image = picture(width, width, max(1, round(width * shape)))
    transform = evaluation_transform(size, crop_pct=crop_pct, interpolation=interpolation)
    batch = gather([Pixels(transform.pixels)(image)])
    images, _ = DecodeAndFinish(transform, PictureReader()).each(batch)
    assert torch.equal(images[0], transform(image))


def test_where_the_device_resizes(monkeypatch: pytest.MonkeyPatch) -> None:
    transform, reader, many = evaluation_transform(32), PictureReader(), 128
    assert not resized_there(transform, reader, CPU, many)
    resized_by(monkeypatch, True)
    assert resized_there(transform, reader, CPU, many)
    assert not resized_there(transform, PictureReader("L"), CPU, many)
    assert not resized_there(transform, PictureReader(value_range=(0, 99)), CPU, many)
    assert not resized_there(evaluation_transform(32, interpolation="nearest"), reader, CPU, many)
    monkeypatch.setattr("fastvim.data.gpu.loading.shared_memory", lambda: 2**26)  # a container's
    assert not resized_there(transform, reader, CPU, many)


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


@pytest.mark.parametrize("device", DEVICES)
def test_the_same_file_whoever_resizes(
    formats: list[str],
    weights: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    device: str,
) -> None:
    paths = [*formats, "/no/such.jpg"]
    for name, content in (
        ("broken.jpg", broken(Path(formats[0]).read_bytes())),
        ("cut.jpg", Path(formats[1]).read_bytes()[:300]),
        ("notes.png", b"not an image"),
    ):
        (tmp_path / name).write_bytes(content)
        paths.insert(3, str(tmp_path / name))
    (tmp_path / "list.txt").write_text("".join(f"{path}\n" for path in paths))
    words = ["--checkpoint", str(weights), "--list", str(tmp_path / "list.txt")]
    words += ["--part-size", "9", "--batch-size", "4", "--device", device]
    found = []
    for there, workers in ((False, "0"), (True, "0"), (True, "2")):
        resized_by(monkeypatch, there)
        out = tmp_path / f"{there}{workers}"
        assert main(["predict", *words, "--workers", workers, "--out", str(out)]) == 0
        found.append((out / "predictions.jsonl").read_bytes())
    assert found[0] == found[1] == found[2]
    assert found[0].count(b'"error"') == 4
    assert "decode" not in caplog.text  # nobody asked


def test_large_images_are_decoded_in_turn(
    files: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    transform = evaluation_transform(32)
    (tmp_path / "broken.jpg").write_bytes(broken(Path(files[0]).read_bytes()))
    pictures = Pictures(PictureReader(), transform.pixels)
    read, finish = for_gpu("gpu", pictures, transform, CPU)
    paths = [*files[:3], str(tmp_path / "broken.jpg"), *files[3:]]
    batch = read.batch([read(path) for path in paths])
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
