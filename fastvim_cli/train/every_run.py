"""What every run has, beside what its configuration and its task add."""

from __future__ import annotations

import errno
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from rich import get_console

from fastvim.errors import UserError
from fastvim.tasks.callbacks.checkpointing import ExportWeights
from fastvim.tasks.callbacks.curves import LearningCurves
from fastvim.tasks.callbacks.health import Finite, NameModules
from fastvim.tasks.callbacks.pace import Pace
from fastvim.tasks.callbacks.progress import ProgressBar
from fastvim.tasks.callbacks.report import Report
from fastvim.tasks.callbacks.run_log import NoEmptyEpoch, RunLog, SeedSteps
from fastvim.tasks.checkpoints import BestCheckpoint, Checkpoint, LastCheckpoint
from fastvim.tasks.task import Task
from fastvim_cli.train.logs import TableLogger

try:
    import fcntl
except ModuleNotFoundError:  # Windows has no such locks
    fcntl = None  # type: ignore[assignment]

_logger = logging.getLogger(__name__)

# The arguments of a data module that prediction needs again.
IMAGE_SETTINGS = (
    *("img_size", "in_chans", "mean", "std"),
    *("base_size", "eval_size", "crop_pct", "interpolation", "antialias", "value_range"),
)
# Of the trainer, those that the weights depend on.
TRAINER_SETTINGS = (
    *("max_epochs", "max_steps", "precision", "devices", "num_nodes"),
    *("accumulate_grad_batches", "gradient_clip_val"),
)


def loggers(root: Path, chosen: Any) -> list[Logger]:
    """The loggers of a training run; each start has its files in `logs/version_N`, N counting up.

    The first one writes a table, whatever the configuration chooses: Lightning puts `config.yaml`
    into the first logger's folder, and the curves are drawn from the table.

    Args:
        root: folder of the run.
        chosen: `trainer.logger` of the configuration; None adds TensorBoard's files.
    """
    first = TableLogger(root, "logs", flush_logs_every_n_steps=1)
    if chosen is None or chosen is True:
        return [first, TensorBoardLogger(root, "logs", version=first.version)]
    return [first, *as_list(chosen or None)]


def callbacks(command: str, root: Path, config: Namespace, task: Task) -> list[Callback]:
    """The callbacks of a run.

    Args:
        command: "fit", "validate" or "test".
        root: folder of the run.
        config: the configuration.
        task: what is trained or evaluated.
    """
    pace = Pace() if command == "fit" else None
    found: list[Callback] = [] if pace is None else [pace]
    if config.trainer.enable_progress_bar is not False and get_console().is_terminal:
        found.append(ProgressBar(pace))
    arguments = config.data.get("init_args") or {}
    images = {name: arguments[name] for name in IMAGE_SETTINGS if name in arguments}
    if command == "test":
        normalisation = {name: images[name] for name in ("mean", "std") if name in images}
        found.append(Report(str(root), **normalisation))
    if command != "fit":
        return found
    found += [
        SeedSteps(int(config.seed_everything)),
        NameModules() if config.name_modules else Finite(),
        NoEmptyEpoch(),
        RunLog(get_console(), pace),
        ExportWeights(root, images, _recipe(config)),
        LearningCurves(str(root / "curves.png")),  # after the weights, which need no picture
    ]
    if config.trainer.enable_checkpointing is not False:
        folder = str(root / "checkpoints")
        # The last: its file then holds the other's state of the same moment.
        kept: list[Checkpoint] = [LastCheckpoint(folder, config.checkpoint_every_n_steps)]
        if config.trainer.limit_val_batches != 0:  # without validation none is the best
            kept.insert(0, BestCheckpoint(folder, task.monitor, task.monitor_mode))
        for checkpoint in kept:
            checkpoint.retry = config.retry_checkpoints
        found += kept
    return found


def _recipe(config: Namespace) -> dict[str, Any]:
    """What of a configuration makes the weights."""
    trainer = {name: config.trainer[name] for name in TRAINER_SETTINGS}
    sections = {name: config[name].as_dict() for name in ("model", "data")}
    return {"seed_everything": config.seed_everything, **sections, "trainer": trainer}


@contextmanager
def only_run(root: Path) -> Iterator[None]:
    """Refuse a second training run that would write into a folder at the same time.

    The kernel frees the lock when the process ends, however it does.

    Args:
        root: folder of the run.

    Raises:
        UserError: another process trains there.
    """
    root.mkdir(parents=True, exist_ok=True)
    with (root / ".lock").open("w") as file:
        try:
            if fcntl is not None:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):  # no locks on this file system
                _logger.warning("%s: %s, so that a second run is not kept out", file.name, error)
            else:
                raise UserError(
                    f"another run is training in {root}: wait for its end, or give another "
                    "--trainer.default_root_dir"
                ) from error
        yield


def as_list(value: Any) -> list[Any]:
    """None as an empty list, a single value as a list of one."""
    if value is None:
        return []
    return list(value) if isinstance(value, list) else [value]
