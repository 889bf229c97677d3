"""Settings of Lightning that a task contradicts, and averages of weights in less than float32."""

from __future__ import annotations

import pytest
import torch
from harness import trainer
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
}


@pytest.mark.parametrize("name", REFUSED)
def test_callbacks_that_contradict_the_loop(tmp_path, data, name):
    args = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 1}
    task = Classification("fastvim_tiny_patch16_224", args, ema_decay=None)
    started = []

    class Begun(Callback):
        def on_train_start(self, *args) -> None:
            started.append(True)

    run = trainer(tmp_path, Begun(), getattr(callbacks, name)(**REFUSED[name]))
    with pytest.raises(UserError, match=f"^trainer.callbacks: {name} does not work with a task"):
        run.fit(task, datamodule=data)
    assert not started


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
