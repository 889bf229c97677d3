"""`fastvim test NAME`: the printed metric is that of the model's own outputs, by hand.

The files are of small models, under published names and in published layouts; their entries of the
table have other sizes and are the real ones in all else.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from coco_sets import write_instances
from faster_coco_eval import COCO, COCOeval_faster
from PIL import Image
from small_published import SMALL, publish, use_folders, write
from timm.data import ImageNetInfo
from torchvision.transforms.v2 import functional as TF

from fastvim.constants import JUMPCP_MEAN, JUMPCP_STD
from fastvim.data.resizing import linear
from fastvim.labels import COCO_CATEGORIES
from fastvim.models.heads.results import coco_results
from fastvim.weights import published_file
from fastvim.weights.table import ENTRIES
from fastvim_cli import main

ROOT = "--data.root=images"
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


DENSE = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 4}


def test_ade20k(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """Windows over the resized image, enlarged to the stored size: 150 classes, 0 ignored."""
    name = "upernet_fastvim_tiny_patch16_512.ade20k"
    head = {**ENTRIES[name].head["segmentation"], "out_indices": (0, 1, 2, 3)}
    head |= {"channels": 16, "aux_channels": 8, "window": 32, "stride": 21}
    images = {**ENTRIES[name].images, "base_size": (128, 32), "img_size": 32}
    model = publish(monkeypatch, name, DENSE, head={"segmentation": head}, images=images)

    root, generator = home / "ade", np.random.default_rng(2)
    for kind in ("images", "annotations"):
        (root / kind / "validation").mkdir(parents=True)
    intersection, union = np.zeros(150), np.zeros(150)
    for number in range(10):
        picture = photo(generator)  # 70 x 50, resized to 45 x 32
        seen = TF.to_image(Image.fromarray(linear(np.asarray(picture), (45, 32)))).float() / 255
        seen = TF.normalize(seen, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])[None]
        with torch.inference_mode():
            left, right = model(seen[..., :32]), model(seen[..., 13:])
        total = torch.zeros(1, 150, 32, 45)
        total[..., :32] += left
        total[..., 13:] += right
        total[..., 13:32] /= 2
        logits = F.interpolate(total, size=(50, 70), mode="bilinear", align_corners=False)
        predicted = logits[0].argmax(dim=0).numpy()
        stored = predicted + 1
        stored[:, 40:] = generator.integers(1, 151)
        stored[:3] = 0
        counts = stored > 0
        for index in np.unique([predicted, stored - 1]):
            one, other = predicted[counts] == index, stored[counts] == index + 1
            intersection[index] += (one & other).sum()
            union[index] += (one | other).sum()
        picture.save(root / "images" / "validation" / f"{number}.png")
        Image.fromarray(stored.astype(np.uint8)).save(
            root / "annotations" / "validation" / f"{number}.png"
        )
    miou = (intersection[union > 0] / union[union > 0]).mean()
    assert 0.01 < miou < 0.99
    assert main(["test", name, "--data.root", str(root), *ON_CPU]) == 0
    output = capsys.readouterr().out
    assert f"test miou {100 * miou:.2f} %   41.8 published" in output
    assert "grandstand" in output  # the table of all classes, by their names


def test_coco(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """The file has some of the categories, not in order; the labels are those of all 80."""
    name = "cascade_mask_rcnn_fastvim_tiny_patch16_1024.coco"
    head = dict(ENTRIES[name].head["detection"])
    heads = {**head["heads"], "hidden_dim": 16, "score_thresh": 0.0, "detections": 10}
    head |= {"channels": 16, "pad_to": 64, "proposals": 50, "heads": heads}
    images = {**ENTRIES[name].images, "img_size": 64, "eval_size": 64}
    model = publish(monkeypatch, name, DENSE, head={"detection": head}, images=images)

    ids, generator = list(COCO_CATEGORIES), np.random.default_rng(3)
    content: dict[str, list[Any]] = {"images": [], "annotations": [], "categories": []}
    results, used = [], set()
    for number in range(1, 11):
        picture = photo(generator)  # 70 x 50, resized to 64 x 46
        seen = TF.to_image(Image.fromarray(linear(np.asarray(picture), (64, 46)))).float() / 255
        with torch.inference_mode():
            (found,) = model.detect([seen])
        results += coco_results(found, (46, 64), (50, 70), number, ids)
        content["images"].append(
            {"id": number, "file_name": f"{number}.png", "width": 70, "height": 50}
        )
        (home / "coco/val2017").mkdir(parents=True, exist_ok=True)
        picture.save(home / "coco/val2017" / f"{number}.png")
        for place in (0, 4):  # two of the detections are right, more or less
            category = results[-len(found["labels"]) + place]["category_id"]
            x, y, w, h = (round(v) for v in results[-len(found["labels"]) + place]["bbox"])
            box = [x, y, max(1, w - 1), max(1, h)]
            corners = [x, y, x + box[2], y, x + box[2], y + box[3], x, y + box[3]]
            used.add(category)
            content["annotations"].append(
                {"id": len(content["annotations"]) + 1, "image_id": number, "iscrowd": 0}
                | {"category_id": category, "bbox": box, "segmentation": [corners]}
                | {"area": box[2] * box[3]}
            )
    content["categories"] = [{"id": i, "name": COCO_CATEGORIES[i]} for i in sorted(used)[::-1]]
    write_instances(home / "coco", "val2017", content)

    truth = COCO(content)
    boxes = [{k: v for k, v in each.items() if k != "segmentation"} for each in results]
    evaluation = COCOeval_faster(truth, truth.loadRes(boxes), "bbox")
    evaluation.run()
    assert 0.01 < evaluation.stats[0] < 0.99
    assert main(["test", name, "--data.root", str(home / "coco"), *ON_CPU]) == 0
    output = capsys.readouterr().out
    assert f"test box_ap {100 * evaluation.stats[0]:.2f} %   45.1 published" in output


def test_what_is_evaluated(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """A name without its tag, the published file, what was converted of it; also `validate`."""
    name = "fastvim_tiny_patch16_224.in1k"
    images = {**ENTRIES[name].images, "img_size": 32}
    model = publish(monkeypatch, name, SMALL, images=images)
    folder = home / "imagenet/val/n02123045"
    folder.mkdir(parents=True)
    photo(np.random.default_rng(4)).save(folder / "1.png")
    with torch.no_grad():
        model.head.bias[281] += 100.0  # tabby
    write(ENTRIES[name], model)
    file, converted = f"weights/{ENTRIES[name].file}", published_file(name)
    for command, words, stage in (
        ("test", name.partition(".")[0], "test"),
        ("test", file, "test"),
        ("test", str(converted), "test"),
        ("validate", name, "val"),
    ):
        assert main([command, words, "--data.root=imagenet", *ON_CPU]) == 0
        assert f"{stage} top1 100.00 %   75.4 published" in capsys.readouterr().out
    record = json.loads((home / "runs" / name / "metrics.json").read_text())
    assert record["checkpoint"] == str(converted)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["fastvim_tiny_patch16_224.in1k"], "expected --data.root DIR as well"),
        (
            ["fastvim_tiny_patch16_224.in1", ROOT],
            "no published weights 'fastvim_tiny_patch16_224.in1'",
        ),
        (["mae_vim_base_patch16_224", ROOT], "see fastvim reconstruct --model mae_vim_base"),
        (
            ["ours.safetensors", ROOT],
            "ours.safetensors holds no published weights: give the recipe",
        ),
        (["fastvim_tiny_patch16_224", "--data.rot=x"], "ImageData has no option 'rot'"),
        (["fastvim_tiny_patch16_224", "--data.seed=1"], "ImageData needs a value for root"),
    ],
)
def test_mistakes_are_one_line(
    words: list[str],
    message: str,
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    publish(monkeypatch, "fastvim_tiny_patch16_224.in1k", SMALL)
    assert main(["test", *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1
