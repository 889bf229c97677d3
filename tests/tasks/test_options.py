"""The options of the tasks on the command line."""

from __future__ import annotations

import pytest
from lightning.pytorch.cli import LightningArgumentParser

from fastvim.tasks import Classification, Detection, LinearProbe, Pretraining, Segmentation

SHARED = {"model", "model_args", "checkpoint", "lr", "lr_batch", "warmup_lr", "weight_decay"}
OPTIONS = {
    Classification: {"num_classes", "warmup_epochs", "weight_decay_end", "ema_decay", "capture"},
    Pretraining: {"warmup_epochs", "ema_decay", "capture", "min_lr", "betas"},
    LinearProbe: {"num_classes", "warmup_epochs", "min_lr", "momentum"},
    Segmentation: {"num_classes", "warmup_steps", "no_decay", "capture", "min_lr"},
    Detection: {"num_classes", "warmup_steps", "no_decay", "layer_decay", "drops"},
}
FIXED = {
    Classification: {"warmup_steps"},
    Pretraining: {"num_classes", "weight_decay_end", "no_decay", "layer_decay", "warmup_steps"},
    LinearProbe: {"mixup", "ema_decay", "capture", "betas", "grad_checkpointing"},
    Segmentation: {"warmup_epochs", "weight_decay_end", "ema_decay", "layer_decay"},
    Detection: {"warmup_epochs", "weight_decay_end", "ema_decay", "min_lr", "capture"},
}


@pytest.mark.parametrize("task", OPTIONS, ids=lambda task: task.__name__)
def test_inherited_options_are_offered_with_help_and_fixed_ones_are_not(task):
    parser = LightningArgumentParser()
    parser.add_class_arguments(task, "model")
    help_of = {
        action.dest.removeprefix("model."): action.help
        for action in parser._actions
        if action.dest.startswith("model.")
    }
    assert help_of.keys() >= SHARED | OPTIONS[task]
    assert not help_of.keys() & FIXED[task]
    assert [name for name, text in help_of.items() if not text] == []


@pytest.mark.parametrize("task", OPTIONS, ids=lambda task: task.__name__)
def test_the_recorded_options_are_those_that_a_task_takes(task):
    recorded = task("fastvim_tiny_patch16_224", lr=0.5).hparams
    assert recorded.keys() >= SHARED | OPTIONS[task]
    assert recorded["lr"] == 0.5
    assert task(**recorded).hparams == recorded


@pytest.mark.parametrize("task", OPTIONS, ids=lambda task: task.__name__)
def test_the_first_options_may_be_given_by_position(task):
    given = {"model": "a_model", "model_args": {"depth": 2}, "num_classes": 7, "checkpoint": "a"}
    if task is Pretraining:
        del given["num_classes"]
    recorded = task(*given.values()).hparams
    assert {name: recorded[name] for name in given} == given
