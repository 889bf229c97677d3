"""Folders of weights in transformers: its wrapper of timm, and its pipeline."""

from __future__ import annotations

import pytest
import torch
from hub_folders import PHOTOS, draw, folder_of, predicted
from PIL import Image, ImageOps

from fastvim.models import create_model
from fastvim.weights.hub import save_folder

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.clients

TINY = "fastvim_tiny_patch16_224"
SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2}


def assert_same(folder, images, tmp_path):
    """The pipeline says of image files what `fastvim predict` says."""
    classify = transformers.pipeline("image-classification", model=str(folder))
    for path, expected in zip(images, predicted(folder, images, tmp_path), strict=True):
        found = {each["label"]: each["score"] for each in classify(path)}
        assert found == pytest.approx(expected, abs=1e-5)


def write(folder, told=None, **options):
    torch.manual_seed(0)
    options = {**SMALL, "num_classes": 3, **options}
    model = create_model(TINY, **options)
    with torch.no_grad():
        model.head.weight.mul_(20)  # probabilities that are not all alike
    metadata = {"model": TINY, "model_args": options, "img_size": 32, **(told or {})}
    save_folder(folder, model.state_dict(), metadata, model)
    return folder


@pytest.mark.parametrize("name", PHOTOS)
def test_every_published_classifier(name, tmp_path, monkeypatch):
    assert_same(folder_of(name, tmp_path, monkeypatch), draw(tmp_path), tmp_path)


@pytest.mark.parametrize(
    ("mode", "told", "options"),
    [
        ("RGB", {"class_names": ["é", "two\nlines", 'a "b"'], "crop_pct": 0.8}, {}),
        ("RGB", {"class_names": ["no", "yes"], "img_size": [40, 24]}, {"num_classes": 2}),
        ("L", {"mean": [0.1307], "std": [0.3081], "crop_pct": 1.0}, {"in_chans": 1}),
        ("RGB", {"interpolation": "bilinear", "mean": [0.4], "std": [0.2]}, {}),
        ("RGB", {"interpolation": "lanczos", "img_size": 48}, {"num_classes": 12}),
    ],
)
def test_classes_sizes_and_preparations(mode, told, options, tmp_path):
    assert_same(write(tmp_path / "run", told, **options), draw(tmp_path, mode), tmp_path)


def test_pictures_of_other_kinds(tmp_path):
    """Turned by EXIF, with a palette, with transparency, grey."""
    folder = write(tmp_path / "run")
    (path,) = draw(tmp_path, count=1)
    with Image.open(path) as image:
        exif = image.getexif()
        exif[0x0112] = 6
        image.save(tmp_path / "turned.jpg", exif=exif, quality=95)
        assert ImageOps.exif_transpose(Image.open(tmp_path / "turned.jpg")).size != image.size
        image.quantize(16).save(tmp_path / "palette.png")
        image.putalpha(100)
        image.save(tmp_path / "transparent.png")
        image.convert("LA").save(tmp_path / "grey.png")
    names = ("turned.jpg", "palette.png", "transparent.png", "grey.png")
    assert_same(folder, [str(tmp_path / name) for name in names], tmp_path)


def test_the_classes_of_transformers(tmp_path):
    folder = write(tmp_path / "run", {"class_names": ["a", "b", "c"]})
    model = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
    assert type(model) is transformers.TimmWrapperForImageClassification
    assert model.config.id2label == {0: "a", 1: "b", 2: "c"}
    (path,) = draw(tmp_path, count=1)
    prepare = transformers.AutoImageProcessor.from_pretrained(folder)
    with Image.open(path) as image, torch.no_grad():
        found = model(**prepare(image)).logits.softmax(-1)[0].tolist()
    (expected,) = predicted(folder, [path], tmp_path)
    assert dict(zip("abc", found, strict=True)) == pytest.approx(expected, abs=1e-5)

    model.save_pretrained(tmp_path / "again")  # and what it writes is a folder of timm's form
    assert_same(folder, [path], tmp_path)
    again = transformers.pipeline("image-classification", model=str(tmp_path / "again"))
    assert {e["label"]: e["score"] for e in again(path)} == pytest.approx(expected, abs=1e-5)
