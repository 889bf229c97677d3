"""Runs on two machines, emulated on the loopback address: alike, apart, killed, started again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from harness import assert_same_training_state, last
from processes import PATIENCE, free_port, start, wait_until

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


@pytest.mark.slow
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
    [
        pytest.param(signal.SIGKILL, 1, id="killed"),
        pytest.param(signal.SIGKILL, 0, id="first-killed", marks=pytest.mark.cluster),
        pytest.param(signal.SIGSTOP, 1, id="hangs", marks=pytest.mark.cluster),
        pytest.param(signal.SIGSTOP, 0, id="first-hangs", marks=pytest.mark.cluster),
    ],
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


def torchrun(config: Path, port: int, *options: str) -> subprocess.Popen:
    """torchrun of one of two machines."""
    log = config.with_name(f"torchrun_{config.stem}_{len(list(config.parent.glob('*.log')))}.log")
    rendezvous = ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=run"]
    words = ["--nnodes=2", "--nproc-per-node=1", "--local-addr=127.0.0.1", *rendezvous, *options]
    command = [sys.executable, "-m", "torch.distributed.run", *words, "-m", "fastvim_cli", "fit"]
    path = os.pathsep.join([*sys.path, os.environ.get("PYTHONPATH", "")])
    with log.open("w") as output:
        return subprocess.Popen(
            [*command, "--config", str(config), *NODES],
            stdout=output,
            stderr=output,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        )


@pytest.mark.slow
def test_torchrun_goes_on_from_the_newest(write_recipe):
    """A process is killed: `--max-restarts` alone ends with the weights of an uninterrupted run."""
    whole = write_recipe({"trainer.max_epochs": 2}, "whole")
    assert [run.end() for run in start(whole, *NODES, processes=2, nodes=2)] == [0, 0]
    kill = {"class_path": "stops.KillOnce", "init_args": {"batch": 5}}
    config = write_recipe({"trainer.max_epochs": 2, "trainer.callbacks": [kill]})
    port = free_port()
    nodes = [torchrun(config, port, "--max-restarts=3") for _ in range(2)]
    try:
        assert [node.wait(2 * PATIENCE) for node in nodes] == [0, 0]
    finally:
        for node in nodes:
            node.kill()
    text = "".join(log.read_text() for log in config.parent.glob("torchrun_*.log"))
    assert "started again: goes on from " in text
    assert_same_training_state(last(whole), last(config))
