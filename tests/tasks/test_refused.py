"""Settings of Lightning that a task contradicts, and averages of weights in less than float32."""

from __future__ import annotations

import pytest
import torch
from harness import ONE_EPOCH, trainer
from lightning.pytorch import callbacks
from lightning.pytorch.callbacks import Callback
from safetensors.torch import load_file

from fastvim.errors import UserError
from fastvim.tasks import Classification
from fastvim_cli import main

REFUSED = {
    "StochasticWeightAveraging": {"swa_lrs": 1e-3},
    "WeightAveraging": {},
    "EMAWeightAveraging": {},
    "LearningRateFinder": {},
    "BatchSizeFinder": {},
    "GradientAccumulationScheduler": {"scheduling": {1: 2}},
    "BackboneFinetuning": {},
    "ModelPruning": {"pruning_fn": "l1_unstructured"},
    "OnExceptionCheckpoint": {"dirpath": "."},
}
# Of the other callbacks, what they cannot be without.
SERVING = {
    "EarlyStopping": {"monitor": "val/acc1"},
    "ThroughputMonitor": {"batch_size_fn": "lightning.pytorch.utilities.data.extract_batch_size"},
}


@pytest.mark.parametrize("name", REFUSED)
def test_callbacks_that_contradict_the_loop(tmp_path, monkeypatch, data, name):
    monkeypatch.chdir(tmp_path)  # where one of them writes
    args = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 1}
    task = Classification("fastvim_tiny_patch16_224", args, ema_decay=None)
    started = []

    class Begun(Callback):
        def on_train_start(self, *args) -> None:
            started.append(True)

    refused = getattr(callbacks, name)(**REFUSED[name])
    run = trainer(tmp_path, Begun(), refused, enable_checkpointing=True)
    with pytest.raises(UserError, match=f"^trainer.callbacks: {name} does not work with a task"):
        run.fit(task, datamodule=data)
    assert not started


@pytest.mark.parametrize("name", callbacks.__all__)
def test_every_callback_of_lightning(write_recipe, capfd, name):
    path = f"lightning.pytorch.callbacks.{name}"
    callback = {"class_path": path, "init_args": {**REFUSED, **SERVING}.get(name, {})}
    file = write_recipe({**ONE_EPOCH, "trainer.callbacks": [callback]})
    code = main(["fit", "--config", str(file)])
    error = capfd.readouterr().err
    if name in REFUSED or name == "BaseFinetuning":
        assert code == 2
        assert error.startswith(f"fastvim: error: trainer.callbacks: {name} does not work with")
        assert error.count("\n") == 1
    elif code:  # a package that the callback asks for is not here
        assert (name, code) == ("DeviceStatsMonitor", 2)
        assert error.startswith("fastvim: error: trainer.callbacks: ")
        assert "psutil" in error
    else:
        assert (file.with_suffix("") / "model.safetensors").exists()


def test_two_callbacks_of_one_name(write_recipe, capsys):
    file = write_recipe({"trainer.callbacks": [{"class_path": "ProgressBar"}]})
    assert main(["fit", "--config", str(file)]) == 2
    error = capsys.readouterr().err
    assert "trainer.callbacks: Multiple subclasses with name ProgressBar" in error


def test_a_spike_that_a_callback_stops_at(write_recipe, capsys):
    options = {"warmup": 1, "window": 2, "rtol": 0.0, "atol": 0.0}
    spike = {"class_path": "SpikeDetection", "init_args": options}
    file = write_recipe({"trainer.callbacks": [spike], "model.init_args.lr": 30})
    assert main(["fit", "--config", str(file)]) == 2
    assert "error: trainer.callbacks: Training spike detected in batch" in capsys.readouterr().err


@pytest.mark.parametrize("strategy", ["ddp_spawn", "ddp_fork"])
def test_processes_that_begin_as_copies(write_recipe, capsys, strategy):
    file = write_recipe({"trainer.strategy": strategy, "trainer.devices": 2})
    assert main(["fit", "--config", str(file)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"fastvim: error: trainer.strategy '{strategy}': expected ddp")
    assert error.count("\n") == 1


def test_a_metric_that_does_not_exist(write_recipe, capsys):
    stop = {"class_path": "EarlyStopping", "init_args": {"monitor": "val/acc7"}}
    file = write_recipe({"trainer.callbacks": [stop], "trainer.max_epochs": 1})
    assert main(["fit", "--config", str(file)]) == 2
    assert "trainer.callbacks: Early stopping conditioned on metric" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("precision", "weights", "averages"),
    [
        ("bf16-true", torch.bfloat16, torch.float32),
        ("16-true", torch.float16, torch.float32),
        ("64-true", torch.float64, torch.float64),
    ],
)
def test_averages_in_other_precisions(write_recipe, precision, weights, averages):
    changes = {
        "model.init_args.ema_decay": 0.999,  # a step changes an average by less than bfloat16 can
        "model.init_args.lr": 1e-3,
        "trainer.precision": precision,
        "trainer.max_epochs": 1,
    }
    whole, halves = write_recipe(changes, "whole"), write_recipe(changes, "halves")
    assert main(["fit", "--config", str(whole)]) == 0
    last = "checkpoints/last.ckpt"
    state = torch.load(whole.with_suffix("") / last, weights_only=True)
    name = "model.blocks.0.mixer.in_proj.weight"
    assert state["current_model_state"][name].dtype == weights
    average = state["state_dict"][name]
    assert average.dtype == averages
    if weights != averages:  # then the validation has not rounded the averages
        assert (average.to(weights).to(averages) != average).any()
    exported = load_file(whole.with_suffix("") / "model.safetensors")
    torch.testing.assert_close(exported[name.removeprefix("model.")], average, rtol=0, atol=0)

    stop = {"trainer.max_steps": 2, "trainer.max_epochs": -1}
    halves = write_recipe({**changes, **stop}, "halves")
    assert main(["fit", "--config", str(halves)]) == 0
    halves = write_recipe(changes, "halves")
    assert main(["fit", "--config", str(halves), "--ckpt_path", "last"]) == 0
    files = (halves.with_suffix("") / "checkpoints").glob("last*.ckpt")
    states = [torch.load(file, weights_only=True) for file in files]
    resumed = max(states, key=lambda state: state["global_step"])
    assert resumed["global_step"] == state["global_step"]
    assert resumed["state_dict"][name].dtype == averages
