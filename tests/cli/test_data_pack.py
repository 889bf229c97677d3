"""`fastvim data pack`, as a person calls it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastvim_cli import main

RECIPE = Path(__file__).parents[2] / "recipes" / "imagenet" / "fastvim_tiny.yaml"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    noise = np.random.default_rng(0)
    for name in ("train/ant/1.png", "train/bee/2.jpg", "val/ant/3.jpg", "val/bee/4.jpg"):
        path = tmp_path / "root" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise.integers(0, 256, (60, 80, 3), dtype=np.uint8)).save(path)
    (tmp_path / "root" / "train" / "ant" / "notes.txt").touch()
    (tmp_path / "root" / "extra" / "ant").mkdir(parents=True)
    return tmp_path / "root"


def run(capsys: pytest.CaptureFixture, *words: object) -> tuple[int, list[str], str]:
    code = main(["data", *map(str, words)])
    output, error = capsys.readouterr()
    return code, output.splitlines(), error


def test_a_pack_is_checked_like_its_folders(root, tmp_path, capsys):
    out = tmp_path / "pack"
    code, lines, error = run(capsys, "pack", root, out)
    assert code == 0
    assert error == "not packed: extra (--splits packs others)\n"
    assert [line.split(" MB")[0] for line in lines] == [
        "train: 2 images, 0.0",
        f"  1 x file that is no image, left out, first: {root}/train: 1 .txt",
        "val: 2 images, 0.0",
        f"packed: fastvim fit --data.root {out} reads it in place of {root}",
    ]
    checked = []
    for place in (root, out):
        code, lines, _ = run(capsys, "check", "--config", RECIPE, "--data.root", place)
        assert code == 0
        checked.append([line for line in lines if "notes" not in line and ".txt" not in line])
    assert checked[1][:-1] == checked[0]
    assert checked[1][-1] == "nothing wrong"


def test_smaller_images(root, tmp_path, capsys):
    words = ("pack", root, tmp_path / "pack", "--size", 48, "--splits", "val", "--workers", 1)
    code, lines, _ = run(capsys, *words)
    assert code == 0
    told = "small crops: 0.08 of 48 x 48 pixels are 14 x 14, enlarged to 224 x 224 by the recipes"
    assert lines[1] == told
    assert (tmp_path / "pack" / "val-00000.tar").is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["pack", "{root}"], "required: OUT; see fastvim data pack --help"),
        (["pack", "{root}", "{root}"], "root: has extra, train, val; expected a new or empty"),
        (["pack", "{root}", "s3://bucket/pack"], "s3://bucket/pack: an address; expected a folder"),
        (["pack", "{root}", "{root}/o", "--size", "0"], "--size: 0: expected 1 to 65536"),
        (["pack", "{root}", "{root}/o", "--splits", "x"], "no split 'x'; expected"),
        (["pack", "{root}", "{root}/o", "--quality", "3"], "unrecognized arguments: --quality 3"),
    ],
)
def test_mistakes_are_one_line(root, capsys, words, message):
    code, _, error = run(capsys, *(word.format(root=root) for word in words))
    assert code == 2
    assert message in error
    assert error.count("\n") == 1
