"""Runs on two machines, emulated on the loopback address: alike, apart, killed, started again."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from harness import assert_same_training_state, fit, last
from processes import PATIENCE, errors, free_port, start, wait_until

NODES = ("--trainer.num_nodes=2", "--trainer.devices=1")
TWO_EPOCHS = {"trainer.max_epochs": 2}
SLOW = {"class_path": "stops.Slow", "init_args": {"seconds": 0.1}}


def together(first: Path, second: Path) -> tuple[list[int], list[str]]:
    """Exit codes and lines of errors of two machines, each with its own configuration."""
    runs = start(first, *NODES, second=second, processes=2, nodes=2)
    codes = [run.end() for run in runs]
    return codes, [line for run in runs for line in run.errors()]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("option", "value", "line"),
    [
        pytest.param(
            *("trainer.max_epochs", 3, "trainer.max_epochs is 1 in process 0 "),
            marks=pytest.mark.cluster,
        ),
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


@pytest.mark.cluster
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


@pytest.mark.cluster
@pytest.mark.parametrize(
    ("number", "rank"),
    [
        pytest.param(signal.SIGKILL, 1, id="killed"),
        pytest.param(signal.SIGKILL, 0, id="first-killed"),
        pytest.param(signal.SIGSTOP, 1, id="hangs"),
        pytest.param(signal.SIGSTOP, 0, id="first-hangs"),
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


@pytest.mark.cluster
def test_a_peer_whose_main_thread_hangs(write_recipe):
    """Its other thread lives on: it is told which one is behind, and the run ends."""
    hang = {"class_path": "stops.HangAt", "init_args": {"batch": 5, "quiet": [2.0, 6.0]}}
    config = write_recipe({"trainer.max_epochs": 1, "trainer.callbacks": [hang]})
    runs = start(config, *NODES, processes=2, nodes=2)
    assert [run.end() for run in runs] == [1, 1]
    told, line = runs[0].errors()
    behind = r"process 1 \(.*\) has not finished a step for {} s, and the others wait for it; "
    assert re.fullmatch("fastvim: " + behind.format(2) + "the run ends after 6 s", told)
    assert re.match("fastvim: error: " + behind.format(6), line)
    assert line.endswith("last.ckpt holds step 2: start all again with --ckpt_path last")
    assert runs[1].errors() == []


def torchrun(configs: tuple[Path, Path], options: list[str], *words: str) -> tuple[list[int], str]:
    """Two machines, each with a torchrun of its own: exit codes, and all that they print.

    Args:
        configs: of each machine; the first one has rank 0 where ranks are given by hand.
        options: of torchrun.
        words: further ones of `fastvim fit`.
    """
    path = os.pathsep.join([*sys.path, os.environ.get("PYTHONPATH", "")])
    nodes, logs = [], [config.with_suffix(".log") for config in configs]
    for rank, (config, log) in enumerate(zip(configs, logs, strict=True)):
        place = [] if ELASTIC[0] in options else [f"--node-rank={rank}"]
        run = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
        run += [*options, *place, "--local-addr=127.0.0.1", "-m", "fastvim_cli", "fit"]
        with log.open("w") as output:
            node = subprocess.Popen(
                [*run, "--config", str(config), *NODES, *words],
                stdout=output,
                stderr=output,
                env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            )
        nodes.append(node)
    try:
        codes = [node.wait(2 * PATIENCE) for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    return codes, "".join(log.read_text() for log in logs)


ELASTIC = ("--rdzv-backend=c10d", "--rdzv-id=run", "--max-restarts=3")


def by_hand() -> list[str]:
    """Options of torchrun on machines whose ranks are given, and which nothing starts again."""
    return ["--master-addr=127.0.0.1", f"--master-port={free_port()}", "--max-restarts=0"]


def elastic() -> list[str]:
    """Options of torchrun on machines that find each other, and start again what has ended."""
    return [*ELASTIC, f"--rdzv-endpoint=127.0.0.1:{free_port()}"]


def two_views(write_recipe, changes: dict) -> tuple[Path, Path]:
    """The recipe of each machine: one folder of the run, which the second sees elsewhere."""
    one = write_recipe(changes, "one")
    two = write_recipe(changes, "two")
    one.with_suffix("").mkdir(exist_ok=True)
    if not two.with_suffix("").is_symlink():
        two.with_suffix("").symlink_to(one.with_suffix(""))
    return one, two


def uninterrupted(write_recipe) -> dict:
    """The last checkpoint of two epochs that nothing ends."""
    whole = write_recipe(TWO_EPOCHS, "whole")
    assert [run.end() for run in start(whole, *NODES, processes=2, nodes=2)] == [0, 0]
    return last(whole)


def test_killed_and_started_again_with_rank_0_elsewhere(write_recipe):
    """The weights are those of an uninterrupted run."""
    killed = {"class_path": "stops.KillAt", "init_args": {"batch": 5}}
    one, two = two_views(write_recipe, {**TWO_EPOCHS, "trainer.callbacks": [killed]})
    runs = start(one, *NODES, second=two, processes=2, nodes=2)
    assert -signal.SIGKILL in [run.end() for run in runs]
    assert 0 < last(one)["global_step"] < 6
    two_views(write_recipe, TWO_EPOCHS)
    again = start(two, *NODES, "--ckpt_path=last", second=one, processes=2, nodes=2)
    assert [run.end() for run in again] == [0, 0]
    assert "resumed after 2\n" in again[0].text()
    assert_same_training_state(uninterrupted(write_recipe), last(one))


@pytest.mark.cluster
def test_torchrun_goes_on_from_the_newest(write_recipe):
    """A process is killed: `--max-restarts` alone ends with the weights of an uninterrupted run."""
    kill = {"class_path": "stops.KillOnce", "init_args": {"batch": 5}}
    views = two_views(write_recipe, {**TWO_EPOCHS, "trainer.callbacks": [kill]})
    codes, text = torchrun(views, elastic())
    assert codes == [0, 0], text
    assert "started again: goes on from " in text
    assert_same_training_state(uninterrupted(write_recipe), last(views[0]))


@pytest.mark.cluster
@pytest.mark.parametrize("swapped", [False, True], ids=["same", "swapped"])
@pytest.mark.parametrize("options", [by_hand, elastic])
def test_torchrun_is_started_again_by_hand(write_recipe, options, swapped):
    """After a kill that ended all, also where the other machine has rank 0 then."""
    kill = {"class_path": "stops.KillOnce", "init_args": {"batch": 5}}
    views = two_views(write_recipe, {**TWO_EPOCHS, "trainer.callbacks": [kill]})
    codes, text = torchrun(views, by_hand())
    assert 0 not in codes, text
    (line,) = errors(text)
    assert line.endswith("start all again with --ckpt_path last")
    one, two = two_views(write_recipe, TWO_EPOCHS)
    codes, text = torchrun((two, one) if swapped else (one, two), options(), "--ckpt_path=last")
    assert codes == [0, 0], text
    assert_same_training_state(uninterrupted(write_recipe), last(one))


@pytest.mark.cluster
@pytest.mark.parametrize("swapped", [False, True], ids=["same", "swapped"])
@pytest.mark.parametrize("copied", [False, True], ids=["first", "copied"])
def test_torchrun_with_folders_of_their_own(write_recipe, copied, swapped):
    """One line, and nothing is trained: at the start, and after the folder was copied."""
    one, two = (write_recipe(TWO_EPOCHS, name) for name in ("one", "two"))
    if copied:
        assert fit(one) == 0
        shutil.copytree(one.with_suffix(""), two.with_suffix(""))
    before = [each.read_bytes() for each in one.parent.rglob("*.ckpt")]
    order = (two, one) if swapped else (one, two)
    codes, text = torchrun(order, by_hand(), "--ckpt_path=last", "--trainer.max_epochs=3")
    assert 0 not in codes, text
    (line,) = errors(text)
    assert "does not see the folder " in line
    assert line.endswith("--trainer.default_root_dir on a disk that all machines share")
    assert [each.read_bytes() for each in one.parent.rglob("*.ckpt")] == before
