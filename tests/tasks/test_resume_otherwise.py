"""A run resumed with other batches, accumulation, averages, seeds or settings."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from harness import PRETRAINING, PROBE, recipe_writer
from torch import Tensor

from fastvim.data.sampler import Seeded
from fastvim_cli import main

STEPS = {  # 96 images; an epoch is stopped after 48 of them
    "data.init_args.batch_size": 8,
    "trainer.accumulate_grad_batches": 1,
    "model.init_args.ema_decay": None,
    "model.init_args.warmup_epochs": 0,
    "trainer.max_epochs": 2,
    "checkpoint_every_n_steps": None,
}
STOPPED = {**STEPS, "trainer.max_steps": 6, "trainer.max_epochs": -1, "checkpoint_every_n_steps": 6}


@pytest.fixture
def seen(monkeypatch) -> list[tuple[int, int]]:
    """(epoch, index) of every training image that is read."""
    found: list[tuple[int, int]] = []
    read = Seeded.__getitem__

    def remember(self, key):
        if isinstance(key, tuple):
            found.append(key)
        return read(self, key)

    monkeypatch.setattr(Seeded, "__getitem__", remember)
    return found


def middle(write_recipe, changes: dict | None = None, steps: int = 6) -> Path:
    """A checkpoint of a run of batches of 8, after some optimiser steps."""
    stops = {"trainer.max_steps": steps, "checkpoint_every_n_steps": steps}
    file = write_recipe({**STOPPED, **stops, **(changes or {})}, "first")
    assert main(["fit", "--config", str(file)]) == 0
    return file.with_suffix("") / "checkpoints" / "last.ckpt"


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("refused")


@pytest.fixture
def refused(place, image_folder) -> Path:
    """A checkpoint as of `middle`, made once, for tests in which no run goes on from it."""
    return _made(place, image_folder)


@functools.cache
def _made(place: Path, images: Path) -> Path:
    # Not a fixture of the module: those run without what `conftest.py` prepares for each test.
    return middle(recipe_writer(place, images))


def goes_on(write_recipe, checkpoint: Path, changes: dict) -> dict[str, Tensor]:
    file = write_recipe({**STEPS, **changes}, "second")
    assert main(["fit", "--config", str(file), "--ckpt_path", str(checkpoint)]) == 0
    return torch.load(file.with_suffix("") / "checkpoints" / "last.ckpt", weights_only=True)


@pytest.mark.parametrize(
    ("batch_size", "accumulated", "steps"),
    [(8, 1, 24), (16, 1, 12), (8, 2, 12), (4, 3, 16), (2, 1, 96)],
)
def test_other_batches_in_the_middle_of_an_epoch(
    write_recipe, seen, batch_size, accumulated, steps
):
    checkpoint = middle(write_recipe)
    first = sorted(seen)
    assert len(first) == 48
    seen.clear()
    sizes = {"data.init_args.batch_size": batch_size}
    state = goes_on(
        write_recipe, checkpoint, {**sizes, "trainer.accumulate_grad_batches": accumulated}
    )
    every = [(epoch, index) for epoch in (0, 1) for index in range(96)]
    assert sorted(first + seen) == every
    assert state["global_step"] == steps  # as of a run of such batches from the start
    assert state["epoch"] == 1


def test_other_batches_after_an_epoch(write_recipe, seen):
    checkpoint = middle(write_recipe, steps=12)
    seen.clear()
    state = goes_on(write_recipe, checkpoint, {"data.init_args.batch_size": 32})
    assert sorted(seen) == [(1, index) for index in range(96)]
    assert state["global_step"] == 6


def test_the_schedule_follows_the_images(write_recipe):
    checkpoint = middle(write_recipe, steps=12)
    whole = write_recipe({**STEPS, "data.init_args.batch_size": 16}, "whole")
    assert main(["fit", "--config", str(whole)]) == 0
    state = goes_on(write_recipe, checkpoint, {"data.init_args.batch_size": 16})
    end = torch.load(whole.with_suffix("") / "checkpoints" / "last.ckpt", weights_only=True)
    rates = [each["optimizer_states"][0]["param_groups"][0]["lr"] for each in (state, end)]
    assert rates[0] == rates[1]


def test_a_run_limited_in_steps_keeps_its_steps(write_recipe, seen):
    checkpoint = middle(write_recipe)
    seen.clear()
    limit = {"trainer.max_steps": 9, "trainer.max_epochs": -1}
    state = goes_on(write_recipe, checkpoint, {**limit, "data.init_args.batch_size": 16})
    assert state["global_step"] == 9
    assert len(set(seen)) == len(seen) == 48


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.init_args.batch_size": 32}, "data.batch_size 32: expected 8 as before, or a size"),
        ({"trainer.accumulate_grad_batches": 4}, "trainer.accumulate_grad_batches 4: expected 1"),
        (
            {"data.init_args.seed": 3},
            "data.seed 3: expected 0, as the checkpoint ends in the middle",
        ),
    ],
)
def test_what_cannot_go_on_is_said(write_recipe, refused, capsys, changes, message):
    capsys.readouterr()
    file = write_recipe({**STEPS, **changes}, "second")
    assert main(["fit", "--config", str(file), "--ckpt_path", str(refused)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"fastvim: error: {message}"), error
    assert "after 48 of its images" in error


def test_another_seed_after_an_epoch_is_another_order(write_recipe, seen):
    checkpoint = middle(write_recipe, steps=12)
    seen.clear()
    goes_on(write_recipe, checkpoint, {"data.init_args.seed": 3, "seed_everything": 5})
    assert sorted(seen) == [(1, index) for index in range(96)]


def test_settings_of_the_optimiser_are_those_of_this_run(write_recipe):
    checkpoint = middle(write_recipe, steps=12)
    changes = {"model.init_args.betas": [0.8, 0.9], "model.init_args.weight_decay": 0.3}
    groups = goes_on(write_recipe, checkpoint, changes)["optimizer_states"][0]["param_groups"]
    assert {tuple(group["betas"]) for group in groups} == {(0.8, 0.9)}
    assert max(group["weight_decay"] for group in groups) == 0.3


def test_other_groups_of_parameters_are_said(write_recipe, refused, capsys):
    file = write_recipe({**STEPS, "model.init_args.layer_decay": None}, "second")
    assert main(["fit", "--config", str(file), "--ckpt_path", str(refused)]) == 2
    assert ": model.layer_decay is not given, 0.8 in the checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"model_args.depth": 1}, ["model_args.depth is 1, 2"]),
        ({"model_args.embed_dim": 16}, ["model_args.embed_dim is 16, 32"]),
        ({"model_args.img_size": 64}, ["model_args.img_size is 64, 32"]),
        ({"num_classes": 9}, ["num_classes is 9, not given"]),
        ({"model": "vim_tiny_patch16_224"}, ["model is vim_tiny", "fastvim_tiny_patch16_224 in"]),
        ({"model": "resnet18", "model_args": {}}, ["model is resnet18, fastvim", "depth is not"]),
    ],
)
@pytest.mark.parametrize("command", ["fit", "test"])
def test_another_model_is_said(write_recipe, refused, capsys, command, changes, told):
    capsys.readouterr()
    options = {f"model.init_args.{name}": value for name, value in changes.items()}
    file = write_recipe({**STEPS, **options}, "second")
    assert main([command, "--config", str(file), "--ckpt_path", str(refused)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("fastvim: error: the checkpoint is of another model: model.")
    assert all(each in error for each in told), error


def test_another_task_is_said(write_recipe, refused, capsys):
    for task in (PRETRAINING, PROBE):
        file = write_recipe({"model": task}, "second")
        assert main(["fit", "--config", str(file), "--ckpt_path", str(refused)]) == 2
        name = task["class_path"].rpartition(".")[2]
        error = capsys.readouterr().err
        assert f"of another model: model is {name}, Classification in the checkpoint" in error


def test_the_same_weights_in_another_walk_are_said(write_recipe, caplog):
    checkpoint = middle(write_recipe, steps=12)
    goes_on(write_recipe, checkpoint, {"model.init_args.model_args.drop_path_rate": 0.1})
    assert "another model" not in caplog.text
    goes_on(write_recipe, checkpoint, {"model.init_args.model_args.alternate": False})
    told = "another model: model.model_args.alternate is False, not given in the checkpoint"
    assert told in caplog.text


@pytest.mark.parametrize("before", [0.9, None])
def test_averages_turned_off_or_on(write_recipe, caplog, before):
    checkpoint = middle(write_recipe, {"model.init_args.ema_decay": before})
    trained = torch.load(checkpoint, weights_only=True)
    name = "model.head.weight"
    weights = trained["current_model_state" if before else "state_dict"][name]
    # At a rate of 0 the weights stay as they were.
    still = {"model.init_args.lr": 0.0, "model.init_args.min_lr": 0.0, "trainer.max_epochs": 1}
    still |= {"model.init_args.weight_decay": 0.0, "model.init_args.warmup_lr": 0.0}
    decay = None if before else 0.9
    state = goes_on(write_recipe, checkpoint, {**still, "model.init_args.ema_decay": decay})
    after = state["current_model_state" if decay else "state_dict"][name]
    torch.testing.assert_close(after, weights, rtol=0, atol=0)
    if before:
        assert "ema_decay is off: the averages of the checkpoint are left out" in caplog.text
