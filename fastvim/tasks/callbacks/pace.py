"""How fast a run trains, and how much of its time it waits for its loader."""

from __future__ import annotations

import logging
import time
from collections import deque
from typing import Any, NamedTuple

import lightning as L

from fastvim.machine import cores
from fastvim.tasks.protocols import TaskData, Waiting

_logger = logging.getLogger(__name__)

WINDOW = 100  # batches
FIRST = 20  # batches of a run that do not count: processes start, kernels compile
TOO_MUCH = 0.2  # share of the time


class Moment(NamedTuple):
    """After a batch: seconds of training and of waiting, and images, since the run began."""

    seconds: float
    waited: float
    images: int


class Pace(L.Callback):
    """Images/s of all processes, and the share of the time spent waiting for the loader.

    Both are of the last `WINDOW` batches, without validations and what comes between epochs. A run
    on a GPU that waits for more than a fifth of the time says once what to change.

    Attributes:
        rate: images/s; None before there are two batches to compare.
        waiting: share from 0 to 1; None also where the loader does not tell it.
    """

    devices = ("cuda",)  # that should not wait

    def __init__(self) -> None:
        self.rate: float | None = None
        self.waiting: float | None = None
        self._moments: deque[Moment] = deque(maxlen=WINDOW + 1)
        self._seconds, self._images, self._batches = 0.0, 0, 0
        self._since = 0.0
        self._told = False

    def describe(self) -> str:
        """`   1,463 images/s, waiting 45 %`; "" before it is known."""
        if self.rate is None:
            return ""
        waiting = "" if self.waiting is None else f", waiting {100 * self.waiting:.0f} %"
        return f"   {self.rate:,.0f} images/s{waiting}"

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._since = time.monotonic()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._seconds += time.monotonic() - self._since

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._since = time.monotonic()

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        now = time.monotonic()
        self._seconds, self._since = self._seconds + now - self._since, now
        self._batches += 1
        data: TaskData = trainer.datamodule
        self._images += data.batch_size * trainer.world_size
        loader = trainer.train_dataloader
        waited = loader.waited if isinstance(loader, Waiting) else float("nan")
        if self._batches < FIRST and not trainer.is_last_batch:
            return
        self._moments.append(Moment(self._seconds, waited, self._images))
        first, last = self._moments[0], self._moments[-1]
        seconds = last.seconds - first.seconds
        if not seconds:
            return
        self.rate = (last.images - first.images) / seconds
        share = (last.waited - first.waited) / seconds
        self.waiting = min(share, 1.0) if share == share else None
        whole = len(self._moments) > WINDOW
        if whole and not self._told and (self.waiting or 0.0) > TOO_MUCH:
            self._tell(trainer)

    def _tell(self, trainer: Any) -> None:
        self._told = True
        if not trainer.is_global_zero or trainer.strategy.root_device.type not in self.devices:
            return
        share = max(1, cores() // trainer.num_devices)
        workers = trainer.train_dataloader.num_workers
        advice = f"data.num_workers {share} would use all cores"
        if workers >= share:
            advice = "smaller files or more cores would help"
        _logger.warning(
            "%.0f %% of the time the training waits for images (%.0f images/s): %d processes load "
            "them, and there are %d cores for each GPU; %s",
            *(100 * (self.waiting or 0.0), self.rate, workers, share, advice),
        )
