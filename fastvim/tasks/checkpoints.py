"""Checkpoint files: what was written is read, and a disk that refuses one loses no earlier one."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_only

from fastvim.errors import MachineError, UserError
from fastvim.weights.archive import check_archive, is_archive, write_archive
from fastvim.weights.unpickle import load_pickled

_logger = logging.getLogger(__name__)
_warn = rank_zero_only(_logger.warning)


class CheckedCheckpointIO(TorchCheckpointIO):
    """Checkpoint files that are whole or absent, on the disk, and compared with their checksums.

    Any reader of torch's files reads them. See `fastvim.weights.archive`.
    """

    def __init__(self) -> None:
        self._refused: list[str] | None = None

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        if "://" in str(path):  # object stores publish a file when it is complete
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        try:
            write_archive(path, checkpoint)
        except MachineError as error:
            if self._refused is None:
                raise
            self._refused.append(str(error))

    @contextmanager
    def collect(self) -> Iterator[list[str]]:
        """Within the block a checkpoint that cannot be written adds a line to the list instead."""
        self._refused = []
        try:
            yield self._refused
        finally:
            self._refused = None

    def load_checkpoint(
        self,
        path: Any,
        map_location: Any = lambda storage, location: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Read a checkpoint, of plain values unless `weights_only` is False.

        Raises:
            UserError: there is none, it is damaged, or it is refused for what it holds.
        """
        if "://" in str(path) or weights_only is False:
            return super().load_checkpoint(path, map_location, weights_only)
        if not os.path.isfile(path):
            raise UserError(f"checkpoint not found: {path}")
        content: dict[str, Any] = load_pickled(Path(path), map_location=map_location)
        if not (is_archive(path) and check_archive(path)):
            _warn("%s has no checksum of this library: a damage would not be seen", path)
        return content


class Checkpoint(ModelCheckpoint):
    """Lightning's callback, which knows what a full disk refused.

    What it records of its files stays true: where one cannot be written, the earlier one is kept
    and compared with the next. All processes stop or go on together, though the first alone writes.

    Attributes:
        retry: go on where a checkpoint cannot be written, and try again at the next one.
        refused: why the latest one could not be written; None when it was.
    """

    retry = False
    refused: str | None = None

    def _save_topk_checkpoint(self, trainer: L.Trainer, monitor_candidates: Any) -> None:
        before = deepcopy({k: v for k, v in vars(self).items() if k in self.state_dict()})
        try:
            super()._save_topk_checkpoint(trainer, monitor_candidates)
        except _RefusedError as error:
            vars(self).update(before)
            self._last_global_step_saved = trainer.global_step  # tried: the next one is another
            self.refused = f"{error}; {last_whole(trainer)}"
            if not self.retry:
                raise MachineError(self.refused) from None
            _warn("%s; trying again at the next checkpoint", self.refused)

    def _save_checkpoint(self, trainer: L.Trainer, filepath: str) -> None:
        io = trainer.strategy.checkpoint_io
        if not isinstance(io, CheckedCheckpointIO):
            super()._save_checkpoint(trainer, filepath)
            return
        with io.collect() as refused:  # all processes meet before one of them stops
            super()._save_checkpoint(trainer, filepath)
        if reason := trainer.strategy.broadcast(refused):
            raise _RefusedError(reason[0])
        self.refused = None


class _RefusedError(Exception):
    """A checkpoint could not be written."""


class BestCheckpoint(Checkpoint):
    """Keeps `best.ckpt`: the state at the best value of a metric.

    Args:
        dirpath: folder of the checkpoints.
        monitor: the metric.
        mode: "max" if higher is better, "min" if lower is.
    """

    def __init__(self, dirpath: str, monitor: str, mode: str) -> None:
        super().__init__(dirpath, "best", monitor=monitor, mode=mode)

    @property
    def state_key(self) -> str:
        return super().state_key.replace(type(self).__qualname__, ModelCheckpoint.__qualname__, 1)


class LastCheckpoint(Checkpoint):
    """Keeps `last.ckpt`: the state after every epoch and, if asked, every n steps.

    A new run in the same folder writes `last-v1.ckpt` and so on; it overwrites nothing.

    Args:
        dirpath: folder of the checkpoints.
        every_n_train_steps: also save after each n-th optimiser step.
    """

    def __init__(self, dirpath: str, every_n_train_steps: int | None = None) -> None:
        super().__init__(
            dirpath=dirpath,
            filename="last",
            every_n_train_steps=every_n_train_steps,
            save_on_train_epoch_end=True,
        )
        # Lightning's constructor takes steps or epochs; a kill should lose neither.
        self._every_n_epochs = 1

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        # The state that a resumed run starts from is already saved. After the next batch, with
        # gradient accumulation, the step count may be the same: saving then would lose the
        # gradients of that batch.
        self._last_global_step_saved = trainer.global_step

    def save_now(self, trainer: L.Trainer) -> None:
        """Save this step, unless it is saved."""
        if self._last_global_step_saved != trainer.global_step:
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        # After the last batch comes the validation. The end of the epoch saves.
        if not trainer.is_last_batch:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)


def newest_whole(files: Sequence[Path]) -> Path:
    """The newest checkpoint that is whole; a line says which newer ones are damaged.

    Args:
        files: from the newest on.

    Raises:
        UserError: all are damaged.
    """
    damaged: list[str] = []
    for file in files:
        try:
            check_archive(file)
        except MachineError:
            raise
        except UserError as error:
            damaged.append(str(error))
        else:
            if damaged:
                _warn("%s: the newest whole checkpoint is %s", "; ".join(damaged), file)
            return file
    raise UserError(f"{'; '.join(damaged)}: no whole checkpoint is left in {files[0].parent}")


def stop_if_refused(trainer: L.Trainer) -> None:
    """Raise MachineError at the end of a run whose latest checkpoint could not be written."""
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, Checkpoint) and callback.refused:
            raise MachineError(callback.refused)


def last_whole(trainer: L.Trainer) -> str:
    """The checkpoint to resume from, for a message."""
    for callback in trainer.checkpoint_callbacks:
        path = callback.best_model_path if isinstance(callback, LastCheckpoint) else ""
        if os.path.exists(path):
            return f"the last good checkpoint is {os.path.relpath(path)}"
    return "no checkpoint was written yet"
