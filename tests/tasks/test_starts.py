"""What a run is told before its first step: nothing to do, nothing to go on from, two at once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from harness import ONE_EPOCH

from fastvim_cli import main

LOCK = """
import fcntl, sys
file = open(sys.argv[1], "w")
fcntl.lockf(file, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def finished(write_recipe, capsys) -> Path:
    """The recipe of a run of one epoch that is complete."""
    file = write_recipe({**ONE_EPOCH, "model.init_args.ema_decay": None})
    assert main(["fit", "--config", str(file)]) == 0
    capsys.readouterr()
    return file


def mistake(capsys, *words: object) -> str:
    """The one line of a command that ends with exit code 2."""
    assert main([str(word) for word in words]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    return error.removeprefix("fastvim: error: ").rstrip("\n")


BATCHES = "expected a number of batches, or a share of them up to 1.0"


@pytest.mark.parametrize(
    ("command", "option", "value", "expected"),
    [
        ("fit", "limit_train_batches", 0, BATCHES),
        ("fit", "limit_train_batches", 0.01, "expected enough for one of 12 batches"),
        ("fit", "limit_val_batches", 0.01, "expected enough for one of 5 batches"),
        ("fit", "limit_val_batches", -2, f"expected 0, {BATCHES.removeprefix('expected ')}"),
        ("fit", "overfit_batches", 1.5, f"expected 0, {BATCHES.removeprefix('expected ')}"),
        ("fit", "min_epochs", 4, "expected 1 or less, as trainer.max_epochs is 1"),
        ("fit", "max_time", "'00:00:00:00'", "expected more than no time"),
        ("validate", "limit_val_batches", 0, BATCHES),
        ("validate", "limit_val_batches", 0.01, "expected enough for one of 5 batches"),
        ("test", "limit_test_batches", 0, BATCHES),
        ("test", "limit_test_batches", 0.1, "expected enough for one of 5 batches"),
        ("test", "limit_test_batches", 3.5, BATCHES),
    ],
)
def test_a_run_over_nothing(finished, capsys, command, option, value, expected):
    words = [command, "--config", finished, f"--trainer.{option}", str(value).strip("'")]
    if command != "fit":
        words += ["--ckpt_path", "last"]
    assert mistake(capsys, *words) == f"trainer.{option} {value}: {expected}"


def test_more_steps_at_least_than_at_most(write_recipe, capsys):
    file = write_recipe({"trainer.max_steps": 2, "trainer.min_steps": 3})
    line = mistake(capsys, "fit", "--config", file)
    assert line == "trainer.min_steps 3: expected 2 or less, as trainer.max_steps is 2"


def test_training_without_validation_has_no_best(write_recipe, capfd):
    file = write_recipe({**ONE_EPOCH, "trainer.limit_val_batches": 0})
    assert main(["fit", "--config", str(file)]) == 0
    assert [path.name for path in file.with_suffix("").rglob("*.ckpt")] == ["last.ckpt"]
    assert "monitor" not in capfd.readouterr().err


@pytest.mark.parametrize("command", ["fit", "validate", "test"])
def test_no_best_checkpoint(write_recipe, capsys, command):
    file = write_recipe()
    line = mistake(capsys, command, "--config", file, "--ckpt_path", "best")
    assert line == f"no best checkpoint in {file.with_suffix('')}/checkpoints"


@pytest.mark.parametrize("command", ["validate", "test"])
def test_no_last_checkpoint_to_evaluate(write_recipe, capsys, command):
    line = mistake(capsys, command, "--config", write_recipe(), "--ckpt_path", "last")
    assert line.startswith("no last checkpoint in ")


def test_no_last_checkpoint_yet(write_recipe, capsys):
    file = write_recipe(ONE_EPOCH)
    assert main(["fit", "--config", str(file), "--ckpt_path", "last"]) == 0
    assert "yet: starting afresh\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--trainer.max_epochs", "1"], "the end of epoch 1 and trainer.max_epochs is 1; a higher"),
        (["--trainer.max_steps", "6"], "at step 6 and trainer.max_steps is 6; a higher one"),
        (["--trainer.max_steps", "4"], "at step 6 and trainer.max_steps is 4; a higher one"),
    ],
)
def test_nothing_left_to_train(finished, capsys, options, told):
    before = torch.load(finished.with_suffix("") / "checkpoints/last.ckpt", weights_only=True)
    assert main(["fit", "--config", str(finished), "--ckpt_path", "last", *options]) == 0
    printed = capsys.readouterr().out
    assert "nothing left to train: the checkpoint is at " in printed
    assert told in printed
    after = torch.load(finished.with_suffix("") / "checkpoints/last.ckpt", weights_only=True)
    assert after["global_step"] == before["global_step"]


def test_no_time_left_to_train(write_recipe, capsys):
    timer = {"class_path": "Timer", "init_args": {"duration": "00:00:00:00"}}
    file = write_recipe({"trainer.callbacks": [timer]})
    assert main(["fit", "--config", str(file)]) == 0
    assert "nothing left to train: trainer.max_time" in capsys.readouterr().out
    assert not list(file.with_suffix("").rglob("*.safetensors"))  # of no step


@pytest.mark.parametrize("command", ["fit", "validate", "test"])
def test_weights_alone_are_no_checkpoint(finished, capsys, command):
    weights = finished.with_suffix("") / "model.safetensors"
    pickled = weights.with_suffix(".pth")
    torch.save({"state_dict": {"head.weight": torch.zeros(2, 3)}}, pickled)
    for path in (weights, pickled):
        line = mistake(capsys, command, "--config", finished, "--ckpt_path", path)
        assert line.startswith(f"{path} is no training checkpoint: ")
        assert f"--model.checkpoint {path}" in line


def test_a_second_run_in_the_folder_of_one_that_goes_on(write_recipe, capsys):
    file = write_recipe(ONE_EPOCH)
    root = file.with_suffix("")
    root.mkdir()
    words = [sys.executable, "-c", LOCK, str(root / ".lock")]
    pipe = subprocess.PIPE
    with subprocess.Popen(words, stdin=pipe, stdout=pipe, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        line = mistake(capsys, "fit", "--config", file)
        assert line.startswith(f"another run is training in {root}: ")
        assert not list(root.rglob("*.ckpt"))
        other.communicate("")
    assert main(["fit", "--config", str(file)]) == 0


@pytest.mark.slow
def test_a_mistake_is_told_by_one_process(write_recipe):
    changes = {"trainer.devices": 2, "trainer.strategy": "ddp", "model.init_args.num_classes": 2}
    words = [sys.executable, "-m", "fastvim_cli", "fit", "--config", str(write_recipe(changes))]
    ended = subprocess.run(words, capture_output=True, text=True, timeout=200, check=False)
    assert ended.returncode == 2, ended.stderr
    assert ended.stderr.count("model.num_classes 2: expected 6 or more") == 1, ended.stderr


@pytest.mark.parametrize("command", ["fit", "validate"])
def test_a_run_is_not_written_to_an_address(write_recipe, capsys, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    words = [command, "--config", write_recipe(), "--trainer.default_root_dir", "s3://bucket/run"]
    line = mistake(capsys, *words)
    assert line.startswith("trainer.default_root_dir 's3://bucket/run': expected a folder: ")
    assert not list(tmp_path.glob("s3*"))


@pytest.mark.parametrize("root", ["s3://bucket/imagenet", "memory://imagenet", "https://a.org/x"])
@pytest.mark.parametrize(
    ("data", "settings"),
    [
        ("images.ImageData", {}),
        ("images.ImageData", {"dataset": "torch/cifar10"}),
        ("segmentation.SegmentationData", {"num_classes": 3}),
        ("detection.DetectionData", {}),
    ],
)
def test_layouts_of_folders_are_not_read_from_an_address(
    write_recipe, capsys, root, data, settings
):
    section = {"class_path": f"fastvim.data.{data}", "init_args": {"root": root, **settings}}
    line = mistake(capsys, "fit", "--config", write_recipe({"data": section}))
    assert line == (
        f"data.root {root!r}: expected a folder on a disk; what can be read from an address are "
        "shards (dataset wds/NAME) and the images that a table lists (ChannelData)"
    )


def test_an_epoch_without_a_batch(write_recipe, capsys):
    """Of a stream that promises images; its data module has no section `init_args`."""
    changes = {"data": {"class_path": "own_data.EmptyData"}, "checkpoint_every_n_steps": None}
    file = write_recipe({**changes, **ONE_EPOCH})
    assert main(["fit", "--config", str(file)]) == 2
    error = capsys.readouterr().err
    assert "fastvim: error: epoch 1 has no training batch: expected as many images as " in error
    assert not list(file.with_suffix("").rglob("*.ckpt"))
