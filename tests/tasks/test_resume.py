"""A run that ended early and was resumed ends with the very weights of one left alone."""

from __future__ import annotations

import signal
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from coco_sets import write_set as write_instances
from harness import MODEL_ARGS, PRETRAINING, PROBE, assert_same_training_state, fit, last
from safetensors.torch import load_file
from segmentation_sets import write_set as write_segments

from fastvim.tasks.callbacks.curves import join
from fastvim.tasks.checkpoints import CheckedCheckpointIO
from fastvim.weights import read
from fastvim_cli import main

MODEL = "fastvim_tiny_patch16_224"
# As recipes/mae has it, decoded in batches.
PRETRAINING_IN_BATCHES = {
    "model": PRETRAINING,
    **{
        f"data.init_args.{name}": value
        for name, value in {
            "scale": [0.2, 1.0],
            "auto_augment": None,
            "re_prob": 0.0,
            "decode": "gpu",
        }.items()
    },
}
BY_STEPS = {"trainer.max_epochs": -1, "trainer.check_val_every_n_epoch": None}
CHANNELS = {
    "model.init_args.model": "fastchannelvim_small_patch16_224",
    "model.init_args.model_args.in_chans": 3,
    "model.init_args.sample_channels": True,
    "model.init_args.weight_decay_end": 0.4,
}


@pytest.fixture(scope="module")
def segments(tmp_path_factory) -> Path:
    return write_segments(tmp_path_factory.mktemp("segments"))


@pytest.fixture(scope="module")
def instances(tmp_path_factory) -> Path:
    return write_instances(tmp_path_factory.mktemp("instances"))


def accumulating(batches: int) -> dict:
    """Two epochs of twelve batches, a number of them a step; a checkpoint every three steps."""
    return {
        "trainer.accumulate_grad_batches": batches,
        "trainer.max_epochs": 2,
        "checkpoint_every_n_steps": 3,
    }


def segmentation() -> dict:
    """Eight steps of two batches, three in an epoch; a validation every four batches."""
    args = {**MODEL_ARGS, "depth": 4, "norm": "layer", "drop_path_rate": 0.2}
    heads = {"channels": 24, "aux_channels": 12, "window": 32, "stride": 16}
    sizes = {"num_classes": 3, "img_size": 32, "base_size": [64, 40]}
    return {
        "model": {
            "class_path": "fastvim.tasks.segmentation.Segmentation",
            "init_args": {
                "model": MODEL,
                "model_args": args,
                **heads,
                "out_indices": [0, 1, 2, 3],
                "warmup_steps": 2,
            },
        },
        "data": {
            "class_path": "fastvim.data.segmentation.SegmentationData",
            "init_args": {**sizes, "batch_size": 2, "num_workers": 0},
        },
        **BY_STEPS,
        "trainer.max_steps": 8,
        "trainer.val_check_interval": 4,
    }


def detection(validation: int) -> dict:
    """Six steps of two batches, two in an epoch; a validation every few batches."""
    args = {**MODEL_ARGS, "img_size": 64, "norm": "layer", "drop_path_rate": 0.2}
    heads = {"channels": 16, "pad_to": 64, "proposals": 32, "hidden_dim": 16, "samples": 16}
    rates = {"lr": 1e-3, "lr_batch": 2, "warmup_steps": 2}
    return {
        "model": {
            "class_path": "fastvim.tasks.Detection",
            "init_args": {"model": MODEL, "model_args": args, **heads, **rates},
        },
        "data": {
            "class_path": "fastvim.data.detection.DetectionData",
            "init_args": {"img_size": 64, "batch_size": 2, "num_workers": 0},
        },
        **BY_STEPS,
        "trainer.max_steps": 6,
        "trainer.val_check_interval": validation,
    }


@dataclass
class End:
    """What ends a run early, and the steps in the checkpoint that it leaves.

    `KillAt` kills the process, `StopAt` raises.
    """

    kind: str
    batch: int
    steps: int | None
    options: dict = field(default_factory=dict)

    def callback(self) -> dict:
        return {
            "class_path": f"stops.{self.kind}",
            "init_args": {"batch": self.batch, **self.options},
        }


# First in the middle of an epoch and of an accumulation, then in a validation, before the epoch's
# checkpoint.
KILLED_TWICE = (End("KillAt", 7, 2), End("KillAt", 20, 10, {"validation": True}))

CASES = {
    "classifier": ({}, None, KILLED_TWICE),
    "autoencoder": ({"model": PRETRAINING}, None, KILLED_TWICE),
    "autoencoder-in-batches": (PRETRAINING_IN_BATCHES, None, [End("KillAt", 7, 2)]),
    "channels": (CHANNELS, None, KILLED_TWICE),
    # With what is folded into its weights.
    "probe": ({"model": PROBE}, None, [End("StopAt", 7, 2)]),
    # In the middle of an epoch, and at its last batch.
    "every-batch-a-step": (accumulating(1), None, [End("StopAt", 11, 9), End("StopAt", 12, 9)]),
    # Before the first checkpoint, and between the batches of a step.
    "three-batches-a-step": (accumulating(3), None, [End("StopAt", 5, None), End("StopAt", 14, 4)]),
    "segmentation": (segmentation(), "segments", [End("KillAt", 9, 4)]),
    # Validated within an epoch, and at its end.
    "detection": (detection(3), "instances", [End("KillAt", 7, 2)]),
    "detection-at-epochs-ends": (detection(4), "instances", [End("KillAt", 7, 2)]),
}


@pytest.mark.slow
@pytest.mark.parametrize(("changes", "folder", "ends"), CASES.values(), ids=CASES)
def test_resumed(write_recipe, request, capsys, changes, folder, ends):
    if folder:
        data = changes["data"]
        options = {**data["init_args"], "root": str(request.getfixturevalue(folder))}
        changes = {**changes, "data": {**data, "init_args": options}}
    whole = write_recipe(changes, name="whole")
    assert main(["fit", "--config", str(whole)]) == 0

    resume: list[str] = []
    for end in ends:
        ended = write_recipe({**changes, "trainer.callbacks": [end.callback()]}, name="ended")
        if end.kind == "KillAt":
            assert fit(ended, *resume) == -signal.SIGKILL
        else:
            assert main(["fit", "--config", str(ended), *resume]) == 2
            assert "stopped by the test" in capsys.readouterr().err
        resume = ["--ckpt_path", "last"]
        if end.steps is None:
            assert not list(ended.with_suffix("").rglob("*.ckpt"))
        else:
            assert last(ended)["global_step"] == end.steps
    write_recipe(changes, name="ended")
    assert main(["fit", "--config", str(ended), *resume]) == 0

    assert_same_training_state(last(whole), last(ended))
    assert (ended.with_suffix("") / "curves.png").exists()
    one, other = (run.with_suffix("") / "model.safetensors" for run in (whole, ended))
    torch.testing.assert_close(load_file(one), load_file(other), rtol=0, atol=0)
    assert read(one).metadata == read(other).metadata
    assert read(one).metadata["img_size"] == (64 if folder == "instances" else 32)


def test_the_logs_of_all_starts_are_joined():
    def rows(*steps: int, loss: float) -> list[dict[str, float]]:
        return [{"step": step, "train/loss": loss} for step in steps]

    # The second start went on after step 4 and did the steps 5 and 6 again.
    joined = join([rows(2, 4, 5, 6, loss=1), [], rows(5, 6, 7, 8, loss=2)])
    assert [(row["step"], row["train/loss"]) for row in joined] == [
        (2, 1),
        (4, 1),
        (5, 2),
        (6, 2),
        (7, 2),
        (8, 2),
    ]


def test_a_checkpoint_is_whole_or_absent(tmp_path, monkeypatch):
    path = tmp_path / "last.ckpt"
    io = CheckedCheckpointIO()
    io.save_checkpoint({"step": torch.tensor(1)}, path)

    def half(checkpoint, file):
        file.write(b"half a file")
        raise RuntimeError("killed")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(RuntimeError, match="killed"):
        io.save_checkpoint({"step": torch.tensor(2)}, path)
    assert io.load_checkpoint(path) == {"step": torch.tensor(1)}
