"""What a cluster or a user sends: stop soon, save, and go on later.

A handler notes the signal, and nothing more. All processes agree between two steps, save, and end.
Before the first step there is nothing to save: there the handler ends the process.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Mapping
from types import FrameType
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import WeightAveraging

from fastvim.errors import MachineError
from fastvim.tasks.checkpoints import LastCheckpoint
from fastvim.tasks.cluster.peers import Peers

# Reasons to stop, the weightiest last: processes agree on the largest.
INTERRUPT, TERMINATE, REQUEUE = 1, 2, 3
_REASONS = {signal.SIGINT: INTERRUPT, signal.SIGTERM: TERMINATE}
if os.name != "nt":
    _REASONS[signal.SIGUSR1] = REQUEUE
_WORDS = {INTERRUPT: "interrupted", TERMINATE: "SIGTERM", REQUEUE: "SIGUSR1"}
_CODES = {INTERRUPT: 130, TERMINATE: 143, REQUEUE: 143}
_ONE_EVENT = 1.0  # seconds: a launcher passes on what its processes get as well
_AGREE_EVERY = 1.0  # seconds
_MOST_BATCHES = 1000  # between two agreements


class Stopped(BaseException):
    """The run ends as it was told to, and all that was trained is saved.

    Args:
        reason: `INTERRUPT`, `TERMINATE` or `REQUEUE`.
        step: optimiser steps done.
    """

    def __init__(self, reason: int, step: int | None = None) -> None:
        super().__init__(reason, step)
        self.reason, self.step = reason, step

    @property
    def code(self) -> int:
        """Exit code: 128 and the number of the signal."""
        return _CODES[self.reason]

    @property
    def told(self) -> str:
        """What has stopped the run, for a message."""
        return _WORDS[self.reason]


class Signals:
    """Notes SIGINT, SIGTERM and SIGUSR1, in place of Lightning's handlers.

    A second signal ends the process at once, but for one that follows SIGUSR1, which is an
    announcement, and for one that comes within a second.

    Args:
        seconds_before_limit: a job of SLURM stops this long before its limit, as with SIGUSR1.

    Attributes:
        saving: there is something to save: a signal is noted. Otherwise it raises `Stopped`.
        over: the process ends already, and signals change nothing.
        received_sigterm: False; Lightning's loops ask for it.
    """

    received_sigterm = False

    def __init__(self, seconds_before_limit: float = 0.0) -> None:
        self.saving = self.over = False
        self._process = os.getpid()
        self._noted: dict[int, float] = {}  # reasons, and when
        self._before: dict[int, Any] = {}
        end = os.environ.get("SLURM_JOB_END_TIME", "")
        self._limit = int(end) - seconds_before_limit if end.isdecimal() else None

    def install(self) -> None:
        """Take the signals from now on, but those that the process was started to ignore."""
        main = threading.current_thread() is threading.main_thread()
        for number in _REASONS if main else ():
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._note)

    def restore(self) -> None:
        """Give the signals back to whom they belonged before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def ignore(self) -> None:
        """Take no more of them: the process ends, and has said how. Python's own end included."""
        for number in self._before:
            signal.signal(number, signal.SIG_IGN)

    @property
    def reason(self) -> int:
        """The weightiest reason to stop; 0 for none."""
        if self._limit is not None and time.time() > self._limit:
            return REQUEUE
        return max(self._noted, default=0)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a loader's worker, which its process ends
            if number == signal.SIGTERM:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        if self.over:
            return
        reason, now = _REASONS[signal.Signals(number)], time.monotonic()
        announced = reason == REQUEUE
        earlier = [when for each, when in self._noted.items() if (each == REQUEUE) == announced]
        if earlier and now - min(earlier) > _ONE_EVENT:
            os._exit(_CODES[reason])
        self._noted.setdefault(reason, now)
        if not self.saving:
            raise Stopped(self.reason)

    def register_signal_handlers(self) -> None:
        """Nothing: Lightning calls it, and its handlers would wait for other processes."""

    def teardown(self) -> None:
        """Nothing: Lightning calls it."""


class StopAtSignal(L.Callback):
    """Saves and stops all processes after the same step, soon after one of them got a signal.

    Processes agree about once a second. A step is saved whole, with all batches that it
    accumulates. In a validation of the last step the checkpoint says that the validation is to do.

    Args:
        signals: of this process.
        peers: all processes.
    """

    def __init__(self, signals: Signals, peers: Peers) -> None:
        self.signals, self.peers = signals, peers
        self._step = -1  # at the last look
        self._validating = False
        self._pace()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._step = trainer.global_step
        self.signals.saving = True

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._pace()
        self._stop_if_told(trainer)  # the epoch before has been saved

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        # After the last batch comes the validation, and what the end of the epoch saves.
        if trainer.global_step != self._step and not trainer.is_last_batch:
            self._step = trainer.global_step
            self._stop_if_told(trainer, save=True)

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._pace()

    def on_validation_batch_end(self, trainer: Any, *args: Any) -> None:
        if not trainer.sanity_checking and not trainer.fit_loop._should_accumulate():
            self._validating = True
            self._stop_if_told(trainer, save=True)
            self._validating = False

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._pace()

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self._validating:  # begins anew, from the first batch on
            progress = checkpoint["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]
            progress["current"] |= dict.fromkeys(progress["current"], 0)
            progress["total"] |= {"ready": 1, "started": 1, "processed": 0, "completed": 0}
            progress["is_last_batch"] = False

    def _pace(self) -> None:
        """Agree after the next batch, whose length tells after how many to do so again."""
        self._every, self._batches, self._since = 1, 0, time.monotonic()

    def _stop_if_told(self, trainer: L.Trainer, save: bool = False) -> None:
        self._batches += 1
        if self._batches < self._every and self.peers.size > 1:
            return
        seconds = (time.monotonic() - self._since) / self._batches
        every = min(_MOST_BATCHES - 1, max(1, int(_AGREE_EVERY / max(seconds, 1e-6))))
        # The longest interval of all goes along with the weightiest reason.
        agreed = self.peers.agree(self.signals.reason * _MOST_BATCHES + every)
        reason, self._every = divmod(agreed, _MOST_BATCHES)
        self._batches, self._since = 0, time.monotonic()
        if reason:
            if save:
                self._save(trainer)
            raise Stopped(reason, trainer.global_step)

    def _save(self, trainer: L.Trainer) -> None:
        if self._validating:  # the averages are in place of the weights
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, WeightAveraging):
                    callback.on_validation_epoch_end(trainer, trainer.lightning_module)
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, LastCheckpoint):
                callback.save_now(trainer)


def requeue(variables: Mapping[str, str] = os.environ) -> str | None:
    """Put the job of SLURM that this is back into the queue; its number, None without a job.

    Raises:
        MachineError: SLURM refuses.
    """
    job = variables.get("SLURM_JOB_ID")
    if job is None or variables.get("SLURM_JOB_NAME") in ("bash", "interactive"):
        return None
    if "SLURM_ARRAY_JOB_ID" in variables:
        name = f"{variables['SLURM_ARRAY_JOB_ID']}_{variables['SLURM_ARRAY_TASK_ID']}"
    else:
        name = job
    program = shutil.which("scontrol") or "scontrol"
    try:
        subprocess.run(
            [program, "requeue", name], check=True, capture_output=True, text=True, timeout=60
        )
    except subprocess.CalledProcessError as error:
        why = " ".join(error.stderr.split()) or f"exit code {error.returncode}"
        raise MachineError(f"scontrol requeue {name}: {why}") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise MachineError(f"scontrol requeue {name}: {error}") from error
    return job
