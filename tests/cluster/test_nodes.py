"""Runs on two machines, emulated on the loopback address: alike, apart, killed, started again."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path

import pytest
from processes import start, wait_until

NODES = ("--trainer.num_nodes=2", "--trainer.devices=1")
SLOW = {"class_path": "stops.Slow", "init_args": {"seconds": 0.1}}


def together(first: Path, second: Path) -> tuple[list[int], list[str]]:
    """Exit codes and lines of errors of two machines, each with its own configuration."""
    runs = start(first, *NODES, second=second, processes=2, nodes=2)
    codes = [run.end() for run in runs]
    return codes, [line for run in runs for line in run.errors()]


@pytest.mark.parametrize(
    ("option", "value", "line"),
    [
        ("trainer.max_epochs", 3, "trainer.max_epochs is 1 in process 0 "),
        ("model.init_args.lr", 0.1, "model.lr is 0.05 in process 0 "),
    ],
)
def test_other_options(write_recipe, option, value, line):
    one = write_recipe({"trainer.max_epochs": 1}, "one")
    root = {"trainer.default_root_dir": str(one.with_suffix(""))}
    two = write_recipe({"trainer.max_epochs": 1, **root, option: value}, "two")
    codes, lines = together(one, two)
    assert codes == [2, 2]
    assert len(lines) == 1
    assert line in lines[0]
    assert not list(one.with_suffix("").rglob("*.ckpt"))


def test_folders_of_their_own(write_recipe):
    one, two = (write_recipe({"trainer.max_epochs": 1}, name) for name in ("one", "two"))
    codes, lines = together(one, two)
    assert codes == [2, 2]
    assert len(lines) == 1
    assert "does not see the folder " in lines[0]
    assert lines[0].endswith("--trainer.default_root_dir on a disk that all machines share")


def test_other_images(write_recipe, image_folder, tmp_path):
    copy = tmp_path / "images"
    copy.mkdir()
    for split in ("train", "val"):
        subprocess.run(["cp", "-r", str(image_folder / split), str(copy)], check=True)
    (copy / "train" / "fox" / "3.jpg").rename(copy / "train" / "fox" / "16.jpg")
    one = write_recipe({"trainer.max_epochs": 1}, "one")
    root = {"trainer.default_root_dir": str(one.with_suffix(""))}
    two = write_recipe({"trainer.max_epochs": 1, **root, "data.init_args.root": str(copy)}, "two")
    codes, lines = together(one, two)
    assert codes == [2, 2]
    assert len(lines) == 1
    assert "the list of images is " in lines[0]


@pytest.mark.parametrize(
    ("number", "rank"),
    [(signal.SIGKILL, 1), (signal.SIGSTOP, 0)],
    ids=["killed", "first-hangs"],
)
def test_a_peer_that_ends_or_hangs(write_recipe, number, rank):
    """The other one ends with one line that tells which, and how to go on."""
    config = write_recipe({"trainer.max_epochs": 99, "trainer.callbacks": [SLOW]})
    runs = start(config, *NODES, processes=2, nodes=2)
    wait_until((config.with_suffix("") / "checkpoints" / "last.ckpt").exists)
    try:
        runs[rank].signal(number)
        assert runs[1 - rank].end() == 1
    finally:
        runs[rank].process.kill()
    (line,) = runs[1 - rank].errors()
    assert f"process {rank} (" in line
    assert "last.ckpt holds step " in line
    assert line.endswith("start all again with --ckpt_path last")
    assert "Traceback" not in runs[1 - rank].text()
