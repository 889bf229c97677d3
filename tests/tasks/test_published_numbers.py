"""`fastvim test NAME`: the printed metric is that of the model's own outputs, by hand.

The files are of small models, under published names and in published layouts; their entries of the
table have other sizes and are the real ones in all else.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_published import SMALL, publish, use_folders, write
from timm.data import ImageNetInfo
from torchvision.transforms.v2 import functional as TF

from fastvim.constants import JUMPCP_MEAN, JUMPCP_STD
from fastvim.weights.table import ENTRIES
from fastvim_cli import main

ON_CPU = ("--trainer.accelerator=cpu", "--data.num_workers=0")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    use_folders(tmp_path, monkeypatch)
    return tmp_path


def photo(generator: np.random.Generator) -> Image.Image:
    coarse = generator.integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((70, 50), Image.Resampling.NEAREST)


def test_imagenet(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Ten images in some of the 1,000 folders; eight under the class that the model gives them."""
    name = "fastvim_tiny_patch16_224.in1k"
    images = {**ENTRIES[name].images, "img_size": 32}
    model = publish(monkeypatch, name, SMALL, images=images)
    generator, folders = np.random.default_rng(0), ImageNetInfo().label_names()
    right = {1: 0, 5: 0}
    for number in range(10):
        picture = photo(generator)
        # The shorter side to 32 / 0.875, the centre, normalised.
        seen = picture.resize((50, 36), Image.Resampling.BICUBIC).crop((9, 2, 41, 34))
        pixels = TF.to_image(seen).float() / 255
        pixels = TF.normalize(pixels, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
        order = model(pixels[None])[0].argsort(descending=True).tolist()
        place = 0 if number < 4 else 2 if number < 8 else 500
        target = order[place]
        right[1] += place < 1
        right[5] += place < 5
        folder = home / "imagenet" / "val" / folders[target]
        folder.mkdir(parents=True, exist_ok=True)
        picture.save(folder / f"{number}.png")
    assert main(["test", name, "--data.root", "imagenet", *ON_CPU]) == 0
    output = capsys.readouterr().out
    assert "test top1 40.00 %   75.4 published" in output
    assert right == {1: 4, 5: 8}
    assert "test acc5 80.00%" in output
    assert (home / "runs" / name / "predictions.png").is_file()


def test_jumpcp(
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Fifty cells of four classes, ten of them for the test; the model has 161 outputs."""
    pd = pytest.importorskip("pandas")
    name = "fastchannelvim_small_patch8_224.jumpcp_maxpool"
    images = {**ENTRIES[name].images, "img_size": 32}
    model = publish(monkeypatch, name, {**SMALL, "num_classes": 161}, images=images)
    with torch.no_grad():
        model.head.bias[:4] += 1.0  # else the few classes are hardly ever predicted
    write(ENTRIES[name], model)

    root, generator = home / "cells", np.random.default_rng(1)
    root.mkdir()
    labels = {"A01": "negcon", "A02": "AKT1", "B01": "TNF", "B02": "WHOLE"}
    samples = {well: f"BRD-{number}" for number, well in enumerate(labels)}
    plate = {"well_position": [*samples], "broad_sample": [*samples.values()]}
    pd.DataFrame(plate).to_csv(root / "plate_map.csv", index=False)
    told = [(samples[w], "" if w == "A01" else label) for w, label in labels.items()]
    metadata = pd.DataFrame(told, columns=["broad_sample", "target"])
    metadata["control_type"] = ["negcon", "", "", ""]
    metadata.to_csv(root / "metadata.csv", index=False)
    wells = [[*labels][number % 4] for number in range(50)]
    arrays = generator.integers(0, 40, (50, 8, 32, 32), dtype=np.uint8)
    for number, array in enumerate(arrays):
        np.save(root / f"{number}.npy", array)
    paths = [f"{number}.npy" for number in range(50)]
    pd.DataFrame({"path": paths, "well_loc": wells}).to_parquet(root / "cells.parquet")

    chosen = np.random.RandomState(0).permutation(50)[40:]  # the last fifth
    mean, std = (torch.tensor(values).view(8, 1, 1) for values in (JUMPCP_MEAN, JUMPCP_STD))
    seen = (torch.from_numpy(arrays[chosen]).float() - mean) / std
    predicted = model(seen).argmax(dim=1)
    classes = ["negcon", "AKT1", "TNF", "WHOLE"]
    right = sum(
        classes.index(labels[wells[i]]) == p for i, p in zip(chosen, predicted, strict=True)
    )
    assert 0 < right < 10
    assert main(["test", name, "--data.root", str(root), *ON_CPU]) == 0
    assert f"test top1 {10 * right:.2f} %   85.0 published" in capsys.readouterr().out
    assert "num_classes 161: the data's 4 classes are taken for the first outputs" in caplog.text
