"""Callbacks that end a run early; the tests name them in configurations."""

from __future__ import annotations

import os
import signal
import threading
import time

import lightning as L


class KillAt(L.Callback):
    """Sends this process SIGKILL: nothing is flushed, closed or saved.

    Args:
        batch: as soon as this number of training batches is done, counted over all epochs.
        validation: instead, in the first validation after that.
    """

    def __init__(self, batch: int, validation: bool = False) -> None:
        self.batch = batch
        self.validation = validation

    def on_train_batch_end(self, trainer, *args) -> None:
        if not self.validation:
            self._kill_if_due(trainer)

    def on_validation_batch_end(self, trainer, *args) -> None:
        if self.validation:
            self._kill_if_due(trainer)

    def _kill_if_due(self, trainer) -> None:
        if trainer.fit_loop.total_batch_idx + 1 >= self.batch and not trainer.sanity_checking:
            os.kill(os.getpid(), signal.SIGKILL)


class StopAt(L.Callback):
    """Raises after a number of training batches, counted over all epochs."""

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def on_train_batch_end(self, trainer, *args) -> None:
        if trainer.fit_loop.total_batch_idx + 1 >= self.batch:
            raise RuntimeError("stopped by the test")


class Poison(L.Callback):
    """Makes the loss, a gradient or a module's result of step 9 not finite, or a weight after it.

    Args:
        what: "loss", "gradient", "module" or "weight".
    """

    def __init__(self, what: str) -> None:
        self.what = what

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        if self.what == "gradient" and trainer.global_step == 8:
            pl_module.model.head.bias.grad[0] = float("nan")

    def on_train_batch_start(self, trainer, pl_module, *args) -> None:
        if self.what == "module" and trainer.global_step == 8:
            pl_module.model.blocks[1].mixer.in_proj.weight.data.fill_(1e38)

    def on_train_batch_end(self, trainer, pl_module, outputs, *args) -> None:
        if trainer.global_step < 9:
            return
        if self.what == "loss":
            outputs["loss"].fill_(float("inf"))
        elif self.what == "weight":
            pl_module.model.head.bias.data[0] = float("nan")


class SignalAt(L.Callback):
    """Sends this process a signal, of rank 0 alone where there are several.

    Args:
        signal: its number.
        batch: after this number of training batches, counted over all epochs.
        validation: instead, in the first validation after that.
    """

    def __init__(self, signal: int, batch: int, validation: bool = False) -> None:
        self.signal, self.batch, self.validation = signal, batch, validation

    def on_train_batch_end(self, trainer, *args) -> None:
        self._send_if_due(trainer, not self.validation)

    def on_validation_batch_end(self, trainer, *args) -> None:
        self._send_if_due(trainer, self.validation and not trainer.sanity_checking)

    def _send_if_due(self, trainer, here: bool) -> None:
        due = trainer.fit_loop.total_batch_idx + 1 >= self.batch
        if here and due and trainer.is_global_zero and self.batch:
            self.batch = 0  # once
            os.kill(os.getpid(), self.signal)


class Slow(L.Callback):
    """Lets every training batch, and every validation batch, take some time.

    Args:
        seconds: of a batch.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def on_train_batch_start(self, *args) -> None:
        time.sleep(self.seconds)

    def on_validation_batch_start(self, *args) -> None:
        time.sleep(self.seconds)


class KillOnce(L.Callback):
    """Sends the last process of a run SIGKILL, unless the run has been started again.

    Args:
        batch: after this number of training batches, counted over all epochs.
    """

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def on_train_batch_end(self, trainer, *args) -> None:
        first = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
        due = trainer.fit_loop.total_batch_idx + 1 >= self.batch
        if first and due and trainer.global_rank == trainer.world_size - 1:
            os.kill(os.getpid(), signal.SIGKILL)


class HangAt(L.Callback):
    """Lets the last process of a run hang in a batch, and all lose their patience within seconds.

    Args:
        batch: after this number of training batches.
        quiet: of `fastvim.tasks.cluster.watch.Watch`.
    """

    def __init__(self, batch: int, quiet: tuple[float, float]) -> None:
        self.batch, self.quiet = batch, quiet

    def on_train_start(self, *args) -> None:
        for thread in threading.enumerate():
            if thread.name == "fastvim-_judge":
                thread._target.__self__._quiet = self.quiet

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if batch_idx == self.batch and trainer.global_rank == trainer.world_size - 1:
            time.sleep(1000)
