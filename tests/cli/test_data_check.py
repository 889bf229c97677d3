"""`fastvim data check`, as a person calls it."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from coco_sets import write_set
from fault_sets import LAYOUTS, draw, recipe
from PIL import Image

from fastvim_cli import main

RECIPES = Path(__file__).parents[2] / "recipes"
COCO = RECIPES / "coco" / "fastvim_tiny.yaml"
ADE20K = RECIPES / "ade20k" / "fastvim_tiny.yaml"


def check(capsys, recipe: Path, root: Path, *words: str) -> tuple[int, str, str]:
    """Exit code, what is printed, and the error."""
    code = main(["data", "check", "--config", str(recipe), "--data.root", str(root), *words])
    return code, *capsys.readouterr()


def test_a_good_set(tmp_path, capsys):
    code, output, error = check(capsys, COCO, write_set(tmp_path))
    assert (code, error) == (0, "")
    assert output.splitlines() == [
        "train2017: 9 images, 2 categories, 16 objects, 0 crowds, 1 image without objects",
        "  sizes: 64x64 (8)",
        "  modes: RGB (8)",
        "  objects of each class: box (8), disc (8)",
        "  1 x image without objects, left out in training, first: 8.png",
        "val2017: 5 images, 2 categories, 8 objects, 0 crowds, 1 image without objects",
        "  sizes: 64x64 (5)",
        "  modes: RGB (5)",
        "  objects of each class: box (4), disc (4)",
        "left out: 1 x train2017: image without objects (first: 8.png)",
    ]


def test_all_mistakes_are_counted_and_named(tmp_path, capsys):
    write_set(tmp_path)
    file = tmp_path / "annotations" / "instances_train2017.json"
    content = json.loads(file.read_text())
    objects = content["annotations"]
    objects[0]["category_id"] = objects[3]["category_id"] = 91
    objects[4]["bbox"][3] = 0
    del objects[5]["segmentation"]
    objects[6]["segmentation"] = {"size": [64, 64], "counts": "zz~~"}
    file.write_text(json.dumps(content))
    (tmp_path / "train2017" / "7.png").unlink()
    (tmp_path / "train2017" / "6.png").write_bytes(b"no image")
    Image.new("RGB", (64, 60)).save(tmp_path / "train2017" / "5.png")
    code, output, error = check(capsys, COCO, tmp_path)
    assert code == 2
    assert "7 mistakes would stop a run" in error
    train, *lines = output.splitlines()
    assert train.startswith("train2017: 9 images, 2 categories, 12 objects")
    found = {line.split(", ")[0].strip(): line for line in lines if " x " in line}
    assert set(found) == {
        "1 x missing image file",
        "2 x unknown category",
        "1 x missing mask",
        "1 x damaged mask",
        "1 x image of another size",
        "1 x unreadable image",
        "1 x box of zero size",
        "1 x image without objects",
    }
    assert "first: annotation 1 of 0.png, category_id 91" in found["2 x unknown category"]
    assert found["1 x missing image file"].endswith("train2017/7.png")
    assert "left out in training, first: annotation 5 of 2.png" in found["1 x box of zero size"]
    assert "5.png: 64x60 pixels" in found["1 x image of another size"]
    assert any(line.startswith("val2017: 5 images") for line in lines)

    code, output, error = check(capsys, COCO, tmp_path, "--no-read")
    assert code == 2
    assert "5 mistakes would stop a run" in error


def test_what_is_left_out_is_no_mistake(tmp_path, capsys):
    write_set(tmp_path)
    file = tmp_path / "annotations" / "instances_val2017.json"
    content = json.loads(file.read_text())
    content["annotations"][0]["bbox"][2] = 0
    file.write_text(json.dumps(content))
    code, output, _ = check(capsys, COCO, tmp_path)
    assert code == 0
    assert "1 x box of zero size" in output
    assert "nothing wrong" not in output


def test_classes_of_pixels(tmp_path, capsys):
    for split in ("training", "validation"):
        for kind in ("images", "annotations"):
            (tmp_path / kind / split).mkdir(parents=True)
        for index in range(4):
            Image.new("RGB", (9, 8)).save(tmp_path / "images" / split / f"{index}.jpg")
            classes = np.full((8, 9), index, dtype=np.uint8)
            Image.fromarray(classes).save(tmp_path / "annotations" / split / f"{index}.png")
    words = ("--data.class_file", "null")
    assert check(capsys, ADE20K, tmp_path, *words)[0] == 0
    annotations = tmp_path / "annotations" / "training"
    (annotations / "1.png").unlink()
    Image.fromarray(np.full((8, 9), 151, dtype=np.uint8)).save(annotations / "2.png")
    code, output, error = check(capsys, ADE20K, tmp_path, *words)
    assert code == 2
    assert "2 mistakes" in error
    assert "  1 x missing annotation, first: " + str(annotations / "1.png") in output
    assert "  1 x value out of range, first: " + str(annotations / "2.png") in output
    code, output, _ = check(capsys, ADE20K, tmp_path, *words, "--data.num_classes", "3")
    assert "validation: 4 images" in output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "the following arguments are required: --config"),
        (("--config", "nowhere.yaml"), "nowhere.yaml"),
        (("--config", str(COCO), "--workers", "0"), "--workers: 0"),
        (("--config", str(COCO), "--data.root", "nowhere"), "train2017.json: no such file"),
    ],
)
def test_mistakes_are_one_line(words, message, capsys):
    assert main(["data", "check", *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_names_are_printed_as_they_are(tmp_path, capsys, monkeypatch):
    """Brackets are no markup, colons no pictures, and `~` is the home directory."""
    write_set(tmp_path / "[bold]set:smile:")
    (tmp_path / "[bold]set:smile:" / "val2017" / "1.png").unlink()
    (tmp_path / "recipe.yaml").write_text(COCO.read_text())
    monkeypatch.setenv("HOME", str(tmp_path))
    words = ["--config=~/recipe.yaml", "--data.root=~/[bold]set:smile:"]
    assert main(["data", "check", *words]) == 2
    output = capsys.readouterr().out
    assert f"missing image file, first: {tmp_path}/[bold]set:smile:/val2017/1.png" in output


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_picture_of_samples_with_their_labels(layout, tmp_path, capsys):
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe(draw(tmp_path / "set", 3, layout), layout)))
    out = tmp_path / "new" / "pictures"
    assert main(["data", "check", f"--config={file}", f"--out={out}"]) == 0
    assert f"samples in {out}/train.png" in capsys.readouterr().out
    picture = np.asarray(Image.open(out / "train.png"))
    assert min(picture.shape[:2]) > 100
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 100  # images, not paper alone


def test_no_picture_of_samples_that_cannot_be_read(tmp_path, capsys):
    write_set(tmp_path)
    for file in (tmp_path / "train2017").iterdir():
        file.write_bytes(b"")
    code, output, error = check(capsys, COCO, tmp_path, "--out", str(tmp_path / "out"))
    assert code == 2
    assert "8 x unreadable image" in output
    picture, mistakes = error.splitlines()
    assert "no picture of samples" in picture
    assert "8 mistakes would stop a run" in mistakes


def test_labels_do_not_matter_where_training_has_none(tmp_path, capsys):
    """Pre-training takes images of one class, or of none; a classifier needs two."""
    set_ = draw(tmp_path / "set", 0, "folders")
    shutil.rmtree(set_.root / "train" / "bee")
    for folder in sorted((set_.root / "train").iterdir())[1:]:
        shutil.rmtree(folder)
    for folder in sorted((set_.root / "val").iterdir())[1:]:
        shutil.rmtree(folder)
    config = recipe(set_, "folders")
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(config))
    assert main(["data", "check", f"--config={file}"]) == 2
    assert "one class in all" in capsys.readouterr().err
    config["model"] = {
        "class_path": "fastvim.tasks.Pretraining",
        "init_args": {"model": "mae_fastvim_tiny_patch16_224"},
    }
    file.write_text(yaml.safe_dump(config))
    assert main(["data", "check", f"--config={file}", f"--out={tmp_path}"]) == 0
    assert capsys.readouterr().out.endswith("nothing wrong\n")


def drawn_recipe(tmp_path: Path, layout: str) -> tuple[Path, Path]:
    """A sound set, and its recipe."""
    set_ = draw(tmp_path / "set", 1, layout)
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe(set_, layout)))
    return set_.root, file


def test_files_that_are_left_out_stand_in_the_last_line(tmp_path, capsys, caplog):
    root, file = drawn_recipe(tmp_path, "folders")
    for name in ("notes.txt", "more.txt", "cat.heic"):
        (root / "train" / "cat" / name).touch()
    caplog.clear()
    code, output, _ = check(capsys, file, root)
    assert code == 0
    assert not caplog.records
    where = f"{root}/train: 2 .txt, 1 .heic"
    assert f"  3 x file that is no image, left out, first: {where}\n" in output
    last = output.splitlines()[-1]
    assert last == f"left out: 3 x train: file that is no image (first: {where})"


@pytest.mark.parametrize("layout", ["folders", "masks", "tables", "coco"])
def test_splits_without_one_to_train_on_are_checked(layout, tmp_path, capsys):
    root, file = drawn_recipe(tmp_path, layout)
    expected = "no such|no split 'train'|no rows of the split 'train'"
    if layout == "tables":
        lines = (root / "table.csv").read_text().splitlines()
        (root / "table.csv").write_text("\n".join(x for x in lines if not x.endswith(",train")))
        damaged = next(root.glob("val-*.npy"))
    else:
        for folder in {*root.glob("**/train"), *root.glob("**/training"), *root.glob("train2017")}:
            shutil.rmtree(folder)
        damaged = sorted(p for p in root.glob("**/val*/**/*") if p.is_file())[0]
    damaged.write_bytes(b"")
    code, output, error = check(capsys, file, root)
    assert code == 2
    assert re.search(f"train: split that cannot be opened .first: .*({expected})", error)
    assert str(damaged) in output
    assert main(["fit", f"--config={file}"]) == 2
    assert re.search(expected, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--data.train_images", "999"), "data.train_images 999: expected 1 to"),
        (("--data.num_classes", "9"), "data.num_classes 9: expected"),
    ],
)
def test_options_are_named_as_they_are_written(words, message, tmp_path, capsys):
    root, file = drawn_recipe(tmp_path, "folders")
    code, _, error = check(capsys, file, root, *words)
    assert code == 2
    assert message in error
    assert main(["fit", f"--config={file}", *words]) == 2
    assert message in capsys.readouterr().err
