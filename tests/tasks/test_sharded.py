"""Training with the weights divided among processes, on CPUs: what one process makes."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from harness import ONE_EPOCH, PRETRAINING, PROBE, fit_together, last
from safetensors.torch import load_file

from fastvim_cli import main

# Without what each process draws for itself.
PLAIN = {
    "model.init_args.model_args.drop_path_rate": 0.0,
    "model.init_args.mixup": 0.0,
    "model.init_args.cutmix": 0.0,
}
SHARDED = {"trainer.strategy": "fsdp2", "trainer.devices": 2, "data.init_args.batch_size": 4}


def losses(config: Path) -> dict[int, float]:
    """The training loss of each step that the latest start of a run has logged."""
    logs = config.with_suffix("") / "logs"
    latest = max(logs.iterdir(), key=lambda folder: int(folder.name.removeprefix("version_")))
    with (latest / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["train/loss"]]
    return {int(row["step"]): float(row["train/loss"]) for row in rows}


def exported(config: Path) -> dict[str, torch.Tensor]:
    return load_file(config.with_suffix("") / "model.safetensors")


def assert_close(ours: dict, theirs: dict, tolerance: float) -> None:
    """Tensors of the same names, whose differences are small beside their norms."""
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert (ours[name] - tensor).norm() <= tolerance * tensor.norm(), name


def test_two_processes_do_what_one_does(write_recipe):
    short = {**PLAIN, **ONE_EPOCH, "trainer.num_sanity_val_steps": 0}
    one, two = write_recipe(short, "one"), write_recipe({**short, **SHARDED}, "two")
    assert main(["fit", "--config", str(one)]) == 0
    assert fit_together(two) == [0, 0]
    assert_close(exported(two), exported(one), 1e-5)


@pytest.mark.cluster
def test_two_processes_do_what_one_does_and_resume(write_recipe):
    one, two = write_recipe(PLAIN, "one"), write_recipe({**PLAIN, **SHARDED}, "two")
    assert main(["fit", "--config", str(one)]) == 0
    assert fit_together(two) == [0, 0]
    assert_close(exported(two), exported(one), 1e-5)
    ours, theirs = last(two), last(one)
    assert ours.keys() == theirs.keys()
    for key in ("state_dict", "current_model_state"):
        assert_close(ours[key], theirs[key], 1e-5)
    states = [run["optimizer_states"][0]["state"] for run in (ours, theirs)]
    for mine, other in zip(*(state.values() for state in states), strict=True):
        assert_close({"sum": mine["exp_avg"]}, {"sum": other["exp_avg"]}, 1e-4)

    # Both stop in the second epoch, in the middle of an accumulation.
    stop = {"class_path": "stops.StopAt", "init_args": {"batch": 19}}
    ended = write_recipe({**PLAIN, **SHARDED, "trainer.callbacks": [stop]}, "ended")
    assert fit_together(ended) == [2, 2]
    checkpoint = ended.with_suffix("") / "checkpoints" / "last.ckpt"
    assert last(ended)["global_step"] == 8

    alone = write_recipe(PLAIN, "alone")
    assert main(["fit", "--config", str(alone), "--ckpt_path", str(checkpoint)]) == 0
    expected = losses(one)
    assert losses(alone) == pytest.approx({k: expected[k] for k in expected if k >= 8}, rel=1e-4)

    write_recipe({**PLAIN, **SHARDED}, "ended")
    assert fit_together(ended, "--ckpt_path", "last") == [0, 0]
    for name, tensor in exported(two).items():
        torch.testing.assert_close(exported(ended)[name], tensor, rtol=0, atol=0)


@pytest.mark.cluster
@pytest.mark.parametrize("model", [PRETRAINING, PROBE], ids=["autoencoder", "probe"])
def test_other_tasks(write_recipe, model):
    changes = {"model": model, "trainer.max_epochs": 2, "trainer.num_sanity_val_steps": 0}
    run = write_recipe({**changes, **SHARDED})
    assert fit_together(run) == [0, 0]
    assert all(weight.isfinite().all() for weight in exported(run).values())
    assert last(run)["global_step"] == 12


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {
                "trainer.devices": 2,
                "trainer.strategy": {
                    "class_path": "lightning.pytorch.strategies.ModelParallelStrategy"
                },
            },
            "trainer.strategy 'ModelParallelStrategy': expected ddp",
        ),
        ({"trainer.strategy": "fsdp"}, "trainer.strategy 'fsdp': expected ddp"),
        (
            {"trainer.strategy": "fsdp2", "trainer.precision": "bf16-true"},
            "trainer.precision 'bf16-true': expected 32-true, 64-true, bf16-mixed with strategy",
        ),
    ],
    ids=["unsharded", "fsdp1", "precision"],
)
def test_what_is_refused(write_recipe, capsys, changes, message):
    assert main(["fit", "--config", str(write_recipe(changes))]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"fastvim: error: {message}"), error
    assert error.count("\n") == 1
