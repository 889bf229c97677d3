"""Rates, decays and averages of short runs, step by step, as the published training had them."""

from __future__ import annotations

import json
from pathlib import Path

import lightning as L
import pytest
import torch
import yaml
from torch import nn

from fastvim.tasks import Classification, Detection, LinearProbe, Pretraining, Segmentation
from fastvim.tasks.callbacks.ema import EMA
from fastvim.tasks.schedules import drops_by_steps, line_by_steps

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden" / "training"
RUNS = json.loads((GOLDEN / "schedules.json").read_text())
TASKS = {task.__name__: task for task in (Classification, Detection, LinearProbe, Pretraining)}
TASKS["Segmentation"] = Segmentation


class Data:
    """As many batches of the published size as a short run has; nothing in them is used."""

    def __init__(self, batches: int, batch_size: int) -> None:
        self.batch_size, self._batches = batch_size, batches

    def train_dataloader(self) -> range:
        return range(self._batches)


class Trainer:
    """What a schedule asks of Lightning's trainer."""

    world_size, limit_train_batches, fast_dev_run, is_global_zero = 1, 1.0, False, True

    def __init__(self, data: Data, accumulate: int, epochs: int, steps: int) -> None:
        self.datamodule, self.accumulate_grad_batches = data, accumulate
        self.max_epochs, self.max_steps = epochs, steps
        self.callbacks: list[L.Callback] = []


def recipe_task(name: str, **options):
    """The task of a recipe, without its network."""
    recipe = yaml.safe_load((ROOT / "recipes" / f"{name}.yaml").read_text())["model"]
    task = TASKS[recipe["class_path"].rpartition(".")[2]]
    return task(**{**recipe["init_args"], **options})


def rates(task, trainer: Trainer, steps: int, scales=(1.0,)):
    """The rate of a group of each scale and the decay of the first, at each step."""
    groups = [
        {"params": [nn.Parameter(torch.zeros(1))], "lr_scale": s, "weight_decay": task.weight_decay}
        for s in scales
    ]
    task.make_optimizer = lambda: torch.optim.SGD(groups, lr=1.0)
    task._trainer = trainer
    schedule = task.configure_optimizers()["lr_scheduler"]["scheduler"]
    found = []
    for step in range(steps):
        schedule.step_update(step)
        found.append([*(group["lr"] for group in groups), groups[0]["weight_decay"]])
    return list(zip(*found, strict=True))


EPOCHS = [name for name, run in RUNS.items() if "epochs" in run]


@pytest.mark.parametrize("name", EPOCHS)
def test_rates_of_runs_in_epochs(name):
    run = RUNS[name]
    task = recipe_task(run["recipe"], warmup_epochs=run["warmup_epochs"])
    accumulate = run.get("accumulate", 1)
    batches = run.get("batches_per_epoch", run.get("steps_per_epoch"))
    size = round(run["peak_lr"] / task.lr * task.lr_batch) // accumulate
    trainer = Trainer(Data(batches, size), accumulate, run["epochs"], -1)
    scales = (1.0, run.get("lowest_scale", 1.0))
    lr, lowest, decay = rates(task, trainer, len(run["lr"]), scales)
    assert lr == pytest.approx(run["lr"], rel=1e-6, abs=0)
    assert lowest == pytest.approx(run.get("lr_lowest_group", run["lr"]), rel=1e-6, abs=0)
    moving = run.get("weight_decay", task.weight_decay)
    assert list(decay) == pytest.approx(
        moving if isinstance(moving, list) else [moving] * len(lr), rel=1e-6
    )


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_warmup_in_epochs_may_end_within_one(accumulate):
    """And between two steps: the rate follows the epoch alone."""
    task = recipe_task("mae/pretrain_fastvim_base", warmup_epochs=2.2)
    lr, _ = rates(task, Trainer(Data(7, task.lr_batch), accumulate, 12, -1), 3)
    epochs = [step * accumulate / 7 for step in range(3)]
    peak = task.lr * accumulate
    assert lr == pytest.approx([peak * epoch / 2.2 for epoch in epochs], rel=1e-12)


@pytest.mark.parametrize("name", ["ade20k", "coco"])
def test_rates_of_runs_in_steps(name):
    run = RUNS[name]
    task = recipe_task(run["recipe"], warmup_steps=run["warmup_steps"])
    trainer = Trainer(Data(1000, task.lr_batch), 1, -1, run["steps"])
    lr, _ = rates(task, trainer, run["steps"])
    assert lr == pytest.approx(run["lr"], rel=1e-6, abs=0)


def test_rates_of_the_true_runs():
    """At some steps of 160,000 and 184,375."""
    run, task = RUNS["ade20k_true"], recipe_task("ade20k/fastvim_tiny")
    rate = line_by_steps(6e-5, 160_000, task.warmup_steps, task.warmup_lr, task.min_lr)
    assert [rate(step) for step in run["step"]] == pytest.approx(run["lr"], rel=1e-6, abs=0)
    assert rate(159_999) == 0
    run, task = RUNS["coco_true"], recipe_task("coco/fastvim_tiny")
    rate = drops_by_steps(1e-4, 184_375, task.warmup_steps, task.warmup_lr, task.drops)
    assert [rate(step) for step in run["step"]] == pytest.approx(run["lr"], rel=1e-6, abs=0)
    around = [rate(step) for step in (163_888, 163_889, 177_545, 177_546)]
    assert around == pytest.approx([1e-4, 1e-5, 1e-5, 1e-6])


class OneWeight(L.LightningModule):
    """A weight that each step sets to the next of some values."""

    def __init__(self, values: list[float]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(values[0]))
        self._steps = torch.tensor(values).diff()

    def training_step(self, batch, batch_idx):
        return -self.weight * self._steps[batch_idx]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)


def test_the_average_lags_a_step(tmp_path):
    golden = json.loads((GOLDEN / "ema.json").read_text())["ema"]
    averages = []

    class Record(EMA):
        def on_before_optimizer_step(self, *args):
            super().on_before_optimizer_step(*args)
            averages.append(self._average_model.module.weight.item())

    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Record(golden["decay"])],
        default_root_dir=tmp_path,
    )
    trainer.fit(OneWeight(golden["weight"]), torch.zeros(len(golden["weight"]) - 1, 1))
    assert averages == pytest.approx(golden["average"][1:], rel=1e-6)
