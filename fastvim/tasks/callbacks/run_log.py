"""What every training run has: reproducible steps, batches, and a line of progress per epoch."""

from __future__ import annotations

import math
import random
import time
from typing import Any

import lightning as L
import numpy as np
import torch
from rich.console import Console

from fastvim.errors import UserError
from fastvim.tasks.callbacks.pace import Pace
from fastvim.tasks.protocols import as_trained_task


class SeedSteps(L.Callback):
    """Makes the randomness of a training step a function of (seed, epoch, batch, process).

    Mixup draws from numpy's generator, dropout and drop-path from torch's. Seeding both before
    every batch lets a killed run resume exactly, from any checkpoint, without storing generators.

    Args:
        seed: of the run.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: object, batch_idx: int
    ) -> None:
        key = (self._seed, trainer.current_epoch, batch_idx, trainer.global_rank)
        state = np.random.SeedSequence(key).generate_state(3)
        random.seed(int(state[0]))
        np.random.seed(int(state[1]))
        # Not `torch.manual_seed`: for kinds of devices that are not in use it keeps the seed with a
        # text of the call stack, which takes longer than all the rest.
        torch.default_generator.manual_seed(int(state[2]))
        device = trainer.strategy.root_device
        if device.type != "cpu":
            torch.get_device_module(device).manual_seed(int(state[2]))


class NoEmptyEpoch(L.Callback):
    """Refuses an epoch without a batch, as of a stream that is too short."""

    def on_train_epoch_end(self, trainer: Any, pl_module: L.LightningModule) -> None:
        # Those before a checkpoint that is resumed count.
        if trainer.fit_loop.epoch_loop.batch_progress.current.ready:
            return
        process = ""
        if trainer.world_size > 1:
            process = f" for process {trainer.global_rank} of {trainer.world_size}"
        raise UserError(
            f"epoch {trainer.current_epoch + 1} has no training batch{process}: expected as many "
            "images as data.batch_size, of a stream in the shards of one of its data.num_workers"
        )


class RunLog(L.Callback):
    """Prints what is about to be trained, then one line per epoch, for a terminal or a file.

    Args:
        console: that of the progress bar, so that lines go above the bar.
        pace: of the training, to tell.
    """

    def __init__(self, console: Console, pace: Pace | None = None) -> None:
        self._console, self._pace = console, pace
        self._start = 0.0
        self._validated = False  # in this epoch; the trainer keeps the metrics of earlier ones
        self._began = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._start = time.monotonic()  # a run resumed in the middle of an epoch starts none
        self._began = True
        if not trainer.is_global_zero:
            return
        parameters = sum(weight.numel() for weight in pl_module.parameters())
        facts = [f"{parameters / 1e6:.2f} M parameters"]
        if (task := as_trained_task(pl_module)) is not None:
            facts.append(f"{task.global_batch} images a step")
            facts.append(f"peak rate {task.peak_lr:.2g}")
        facts.append(f"{int(trainer.estimated_stepping_batches):,} steps")
        if trainer.global_step:
            facts.append(f"resumed after {trainer.global_step:,}")
        self._print("   ".join(facts))

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._start = time.monotonic()
        self._validated = False

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._validated = True

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        last = trainer.max_epochs if trainer.max_epochs and trainer.max_epochs > 0 else ""
        line = f"epoch {trainer.current_epoch + 1:>{len(str(last))}}" + (f"/{last}" if last else "")
        metrics = trainer.callback_metrics
        validation = [name for name in metrics if name.startswith("val/") and self._validated]
        # A run that was ended in the validation goes on there, without a batch of this epoch.
        training = ["train/loss_epoch"] if "train/loss_epoch" in metrics else []
        for name in (*training, *validation):
            line += f"   {describe(name.removesuffix('_epoch'), float(metrics[name]))}"
        if self._pace is not None:
            line += self._pace.describe()
        self._print(f"{line}   {time.monotonic() - self._start:.1f} s")

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero and not self._began:
            self._print(f"nothing left to train: {_why_done(trainer)} goes on")

    def _print(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)


def _why_done(trainer: L.Trainer) -> str:
    """What had ended a run before it began, and the option that would let it go on."""
    if 0 <= trainer.max_steps <= trainer.global_step:
        step = f"the checkpoint is at step {trainer.global_step:,}"
        return f"{step} and trainer.max_steps is {trainer.max_steps:,}; a higher one"
    epochs = trainer.current_epoch  # complete ones
    if trainer.max_epochs is not None and 0 <= trainer.max_epochs <= epochs:
        epoch = f"the checkpoint is at the end of epoch {epochs:,}"
        return f"{epoch} and trainer.max_epochs is {trainer.max_epochs:,}; a higher one"
    return (
        "trainer.max_time, which counts the time before the checkpoint too, is over; a longer one"
    )


def describe(name: str, value: float) -> str:
    """One metric for a person: `val acc1 96.4 %`, `train loss 0.1234`, `val miou -` of nothing."""
    label = name.replace("/", " ")
    share = name.partition("/")[2].startswith(("acc", "miou", "box_ap", "mask_ap"))
    if share:
        return f"{label} -" if math.isnan(value) else f"{label} {value:.2%}"
    return f"{label} {value:.4f}"
