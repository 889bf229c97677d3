"""Loaders that decode batches: the batches of the loading processes, on any device."""

from __future__ import annotations

import logging
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from jpeg_files import broken
from PIL import Image

from fastvim.data.images import ImageData
from fastvim.data.pixels import UnreadableImageError
from fastvim.errors import UserError

STD = 0.225 * 255  # of a level, about
ORIENTATION = 0x0112
RECIPES = Path(__file__).parents[2] / "recipes"


def picture(seed: int, high: int = 90, wide: int = 120) -> Image.Image:
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((wide, high))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JPEG files that lie on all sides, and others that a GPU is not given."""
    folder = tmp_path_factory.mktemp("batches")
    for split in ("train", "val"):
        for name in ("ant", "bee"):
            (folder / split / name).mkdir(parents=True)
    for number in range(8):
        exif = Image.Exif()
        exif[ORIENTATION] = number + 1
        place = folder / "train" / ("ant", "bee")[number % 2] / f"{number}.jpg"
        picture(number).save(place, exif=exif, quality=90)
    ant, bee = folder / "train/ant", folder / "train/bee"
    picture(20).save(ant / "progressive.jpg", progressive=True)
    picture(21).convert("L").save(bee / "grey.jpg")
    picture(22).convert("CMYK").save(ant / "printed.jpg")
    picture(23).save(bee / "other.png")
    picture(30).save(folder / "val/ant/0.jpg")
    picture(31).save(folder / "val/bee/1.jpg")
    return folder


def batches(root: Path, decode: str, workers: int = 0, **settings: Any) -> list[Any]:
    common = {"batch_size": 4, "num_workers": workers, "img_size": 40, "seed": 5}
    data = ImageData(str(root), decode=decode, **{**common, **settings})  # type: ignore[arg-type]
    data._datasets["train"] = data.open("train")
    return list(data.train_dataloader())


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("settings", [{}, {"auto_augment": "", "color_jitter": 0.4, "vflip": 0.5}])
def test_batches_are_those_of_the_loading_processes(
    root: Path, settings: dict, workers: int
) -> None:
    expected = batches(root, "cpu", **settings)
    found = batches(root, "gpu", workers, **settings)
    assert len(found) == len(expected) == 3
    for (images, targets), (others, same) in zip(found, expected, strict=True):
        assert torch.equal(targets, same)
        assert images.shape == (4, 3, 40, 40)
        assert_close(images, others)


def assert_close(images: torch.Tensor, others: torch.Tensor) -> None:
    """Equal but for some pixels of crops whose height Pillow resizes first."""
    assert images.dtype == others.dtype == torch.float32
    apart = (images - others).abs() * STD
    assert apart.mean() < 0.05
    assert (apart > 1.5).float().mean() < 0.002  # a few levels, beside edges


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_of_pretraining(root: Path, tmp_path: Path, workers: int) -> None:
    """As the recipe says, of images outside class folders."""
    recipe = yaml.safe_load((RECIPES / "mae/pretrain_fastvim_base.yaml").read_text())
    settings = recipe["data"]["init_args"]
    settings = {**settings, "img_size": 40, "batch_size": 4, "num_workers": workers}
    for number, file in enumerate(sorted((root / "train").rglob("*.*"))):
        place = tmp_path / "train" / f"{number}{file.suffix}"
        place.parent.mkdir(exist_ok=True)
        place.write_bytes(file.read_bytes())
    expected = batches(tmp_path, "cpu", **settings)
    found = batches(tmp_path, "gpu", **settings)
    assert len(found) == len(expected) == 3
    for (images, targets), (others, same) in zip(found, expected, strict=True):
        assert targets.tolist() == same.tolist() == [-1] * 4
        assert_close(images, others)


def test_part_of_the_images(root: Path) -> None:
    expected = batches(root, "cpu", train_images=8, re_prob=0.0)
    found = batches(root, "gpu", train_images=8, re_prob=0.0)
    assert [targets.tolist() for _, targets in found] == [each.tolist() for _, each in expected]


def test_a_cpu_decodes_in_the_loading_processes_by_itself(root: Path) -> None:
    for (images, _), (others, _) in zip(batches(root, "auto"), batches(root, "cpu"), strict=True):
        assert torch.equal(images, others)


def jpeg(seed: int) -> bytes:
    file = BytesIO()
    picture(seed).save(file, "JPEG")
    return file.getvalue()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_file_without_its_end_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, workers: int
) -> None:
    for number in range(8):
        place = tmp_path / "train" / "ab"[number % 2] / f"{number}.jpg"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(jpeg(number)[: 700 if number == 3 else None])
    found = batches(tmp_path, "gpu", workers, re_prob=0.0)
    expected = batches(tmp_path, "cpu", re_prob=0.0)
    assert [targets.tolist() for _, targets in found] == [each.tolist() for _, each in expected]
    assert "3.jpg: unreadable image" in caplog.text or workers  # theirs is on their own output


def test_a_file_that_no_decoder_takes_is_named_and_replaced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(4):
        place = tmp_path / "train" / "ab"[number % 2] / f"{number}.jpg"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(broken(jpeg(number)) if number == 1 else jpeg(number))
    with caplog.at_level(logging.WARNING):
        ((images, targets),) = batches(tmp_path, "gpu", auto_augment="", re_prob=0.0)
    assert "1.jpg: unreadable image" in caplog.text
    assert "takes its place" in caplog.text
    assert torch.isfinite(images).all()
    equal = [(i, j) for i in range(4) for j in range(i) if torch.equal(images[i], images[j])]
    assert len(equal) == 1
    assert targets[equal[0][0]] == targets[equal[0][1]]


def test_a_batch_without_any_image_ends_the_run(tmp_path: Path) -> None:
    for number in range(2):
        place = tmp_path / "train" / "ab"[number] / f"{number}.jpg"
        place.parent.mkdir(parents=True)
        place.write_bytes(broken(jpeg(number)))
    with pytest.raises(UnreadableImageError, match="no image of its batch can be read"):
        batches(tmp_path, "gpu", batch_size=2)


def test_evaluation(root: Path, tmp_path: Path) -> None:
    found = []
    for decode in ("cpu", "gpu"):
        data = ImageData(str(root), batch_size=2, num_workers=0, img_size=40, eval_decode=decode)
        data.setup("validate")
        ((images, targets),) = data.val_dataloader()
        found.append(images)
        assert targets.tolist() == [0, 1]
        assert images.dtype == torch.float32
    assert torch.equal(*found)  # evaluation's width is resized first
    for name in ("ant", "bee"):
        place = tmp_path / "val" / name / "0.jpg"
        place.parent.mkdir(parents=True)
        place.write_bytes(broken(jpeg(0)) if name == "bee" else jpeg(0))
    data = ImageData(str(tmp_path), batch_size=2, num_workers=0, eval_decode="gpu")
    data.setup("validate")
    with pytest.raises(UnreadableImageError, match=r"bee/0\.jpg: unreadable image"):
        list(data.val_dataloader())
    data = ImageData(str(root), in_chans=1, mean=(0.5,), std=(0.2,), eval_decode="gpu")
    data.setup("validate")
    with pytest.raises(UserError, match="eval_decode 'gpu': expected cpu, as the images are grey"):
        data.val_dataloader()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_of_what_pillow_decodes(
    root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    workers: int,
    device: str,
) -> None:
    """Resized by the trainer's device to the pixels, and with the errors, of the processes."""

    def evaluated(root: Path, there: bool, **settings: Any) -> list[Any]:
        monkeypatch.setattr("fastvim.data.gpu.loading.has_kernels", lambda _: there)
        monkeypatch.setattr(ImageData, "device", torch.device(device))
        data = ImageData(str(root), eval_batch_size=5, num_workers=workers, img_size=40, **settings)
        data.setup("validate")
        return list(data.val_dataloader())

    expected = evaluated(root, False, val_split="train")
    found = evaluated(root, True, val_split="train")
    assert [len(targets) for _, targets in found] == [5, 5, 2]
    for (images, targets), (others, same) in zip(found, expected, strict=True):
        assert torch.equal(images, others)
        assert torch.equal(targets, same)
    assert "decode" not in caplog.text  # nobody asked
    for name in ("ant", "bee"):
        place = tmp_path / "val" / name / "0.jpg"
        place.parent.mkdir(parents=True)
        place.write_bytes(broken(jpeg(0)) if name == "bee" else jpeg(0))
    for there in (False, True):
        with pytest.raises(UnreadableImageError, match=r"bee/0\.jpg: unreadable image"):
            evaluated(tmp_path, there)
    grey = {"in_chans": 1, "mean": (0.5,), "std": (0.2,)}
    assert torch.equal(evaluated(root, True, **grey)[0][0], evaluated(root, False, **grey)[0][0])


def test_one_too_large_is_said(root: Path) -> None:
    with pytest.raises(UserError, match=r"too large, 1\d\dx\d\d|too large, \d\dx1\d\d"):
        batches(root, "gpu", max_pixels=5000)


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"auto_augment": "augmix-m5-w2"}, "auto_augment has other operations"),
        ({"in_chans": 1, "mean": 0.5, "std": 0.2, "auto_augment": ""}, "the images are grey"),
        ({"value_range": (0, 200)}, "a value_range is given"),
    ],
)
def test_what_cannot_be_is_refused(root: Path, settings: dict, why: str) -> None:
    settings = {
        name: (value,) if name in ("mean", "std") else value for name, value in settings.items()
    }
    with pytest.raises(UserError, match=f"decode 'gpu': expected cpu, as {why}"):
        batches(root, "gpu", **settings)
    assert batches(root, "auto", **settings)
    with pytest.raises(UserError, match="decode"):
        ImageData(str(root), decode="fast")  # type: ignore[arg-type]
