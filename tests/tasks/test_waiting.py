"""A training step gives a GPU its work and does not wait for it, nor for Lightning's checks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from harness import MODEL_ARGS, trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

from fastvim.tasks import Classification, step_log
from fastvim.tasks.callbacks import progress
from fastvim.tasks.callbacks.health import Finite
from fastvim.tasks.callbacks.pace import Pace
from fastvim.tasks.callbacks.progress import ProgressBar
from fastvim.tasks.callbacks.run_log import SeedSteps


class Reads(TorchDispatchMode):
    """Counts numbers that are read off tensors, and so off a GPU."""

    count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


class Plain(Classification):
    """With an optimiser that reads nothing: AdamW on a CPU reads the number of its steps."""

    def make_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.model.parameters(), lr=0.01)


def classification(kind: type[Classification] = Classification, **options: Any) -> Classification:
    args = {**MODEL_ARGS, "drop_path_rate": 0.2}
    return kind("fastvim_tiny_patch16_224", args, warmup_epochs=0, ema_decay=0.9, **options)


def test_no_number_is_read_in_a_step(tmp_path, data, monkeypatch):
    images = TensorDataset(torch.randn(48, 3, 32, 32), torch.arange(48) % 6)
    # Not the loader's, which reads the numbers that it draws.
    monkeypatch.setattr(data, "train_dataloader", lambda: DataLoader(images, 4))
    counts = []
    for steps in (3, 9):
        run = trainer(tmp_path, SeedSteps(0), Pace(), limit_val_batches=0, max_steps=steps)
        with Reads() as reads:
            run.fit(classification(Plain), data)
        assert run.global_step == steps
        counts.append(reads.count)
    assert counts[0] == counts[1]


class NoWaiting(L.Callback):
    """Makes a wait for the GPU an error in all steps but the first, recorded ones, and the last."""

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: object, batch_idx: int
    ) -> None:
        if batch_idx > 1 and not trainer.is_last_batch:
            torch.cuda.set_sync_debug_mode("error")

    def on_train_batch_end(self, *args: Any) -> None:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("capture", [True, False])
def test_a_gpu_is_not_waited_for(tmp_path, data, capture):
    callbacks = SeedSteps(0), Pace(), Finite(), NoWaiting()
    run = trainer(tmp_path, *callbacks, accelerator="gpu", devices=1, precision="bf16-mixed")
    try:
        run.fit(classification(capture=capture), data)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert run.global_step > 5


def test_the_bar_reads_the_loss_once_a_second(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(L.pytorch.callbacks.ProgressBar, "get_metrics", lambda *_: {"v_num": 3})
    bar = ProgressBar()
    assert bar.refresh_rate == 10
    run: Any = SimpleNamespace(training=True, is_last_batch=False, callback_metrics={})
    task: Any = None
    assert bar.get_metrics(run, task) == {}
    run.callback_metrics["train/loss"] = torch.tensor(0.5)
    assert bar.get_metrics(run, task) == {"train/loss": 0.5}
    run.callback_metrics["train/loss"] = torch.tensor(0.25)
    now[0] += 0.9
    assert bar.get_metrics(run, task) == {"train/loss": 0.5}
    now[0] += 0.1
    assert bar.get_metrics(run, task) == {"train/loss": 0.25}
    run.callback_metrics["train/loss"], run.is_last_batch = torch.tensor(0.125), True
    assert bar.get_metrics(run, task) == {"train/loss": 0.125}


def test_other_bars_show_the_loss(tmp_path, data):
    settings = {"limit_val_batches": 0, "max_steps": 2, "enable_progress_bar": True}
    run = trainer(tmp_path, TQDMProgressBar(), **settings)
    run.fit(classification(), data)
    assert run.progress_bar_metrics["train/loss"] == run.callback_metrics["train/loss"]


class Record(L.Callback):
    """What is logged after every batch and epoch."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def _note(self, trainer: L.Trainer, *_: Any) -> None:
        found = {**trainer.callback_metrics, **trainer.logged_metrics}
        self.rows.append({name: float(value) for name, value in found.items()})

    on_train_batch_end = on_train_epoch_end = on_validation_end = _note


def test_values_are_those_that_lightning_keeps(tmp_path, data, monkeypatch):
    rows, ours = {}, step_log._update
    for way in ("ours", "Lightning's"):
        L.seed_everything(0)
        record, updated = Record(), []

        def update(*args: Any, way: str = way, updated: list[bool] = updated) -> bool:
            updated.append(way == "ours" and ours(*args))
            return updated[-1]

        monkeypatch.setattr(step_log, "_update", update)
        run = trainer(
            tmp_path,
            *(SeedSteps(0), record),
            **{"max_epochs": 2, "accumulate_grad_batches": 2, "val_check_interval": 0.5},
        )
        run.fit(classification(), data)
        rows[way] = record.rows
        assert updated.count(True) == (
            22 if way == "ours" else 0
        )  # but for the first of 12 batches
    assert rows["ours"] == rows["Lightning's"]
    assert len({row["train/loss_epoch"] for row in rows["ours"] if "train/loss_epoch" in row}) > 1
