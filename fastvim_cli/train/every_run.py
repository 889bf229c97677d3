"""What every run has, beside what its configuration and its task add."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from rich import get_console

from fastvim.tasks.callbacks.checkpointing import ExportWeights, FiniteLoss, LastCheckpoint
from fastvim.tasks.callbacks.curves import LearningCurves
from fastvim.tasks.callbacks.progress import ProgressBar
from fastvim.tasks.callbacks.report import Report
from fastvim.tasks.callbacks.run_log import RunLog, SeedSteps
from fastvim.tasks.task import Task

# The arguments of a data module that prediction needs again.
IMAGE_SETTINGS = (
    *("img_size", "in_chans", "mean", "std"),
    *("base_size", "eval_size", "crop_pct", "interpolation", "antialias", "value_range"),
)


def loggers(root: Path, chosen: Any) -> list[Logger]:
    """The loggers of a training run; each start has its files in `logs/version_N`, N counting up.

    The first one writes a table, whatever the configuration chooses: Lightning puts `config.yaml`
    into the first logger's folder, and the curves are drawn from the table.

    Args:
        root: folder of the run.
        chosen: `trainer.logger` of the configuration; None adds TensorBoard's files.
    """
    first = CSVLogger(root, "logs", flush_logs_every_n_steps=1)
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
    found: list[Callback] = []
    if config.trainer.enable_progress_bar is not False and get_console().is_terminal:
        found.append(ProgressBar())
    arguments = config.data.init_args
    images = {name: arguments[name] for name in IMAGE_SETTINGS if name in arguments}
    if command == "test":
        normalisation = {name: images[name] for name in ("mean", "std") if name in images}
        found.append(Report(str(root), **normalisation))
    if command != "fit":
        return found
    found += [
        SeedSteps(int(config.seed_everything)),
        FiniteLoss(),
        RunLog(get_console()),
        LearningCurves(str(root / "curves.png")),
        ExportWeights(str(root / "model.safetensors"), images),
    ]
    if config.trainer.enable_checkpointing is not False:
        folder = str(root / "checkpoints")
        found += [
            ModelCheckpoint(folder, "best", monitor=task.monitor, mode=task.monitor_mode),
            # The last: its file then holds the other's state of the same moment.
            LastCheckpoint(folder, config.checkpoint_every_n_steps),
        ]
    return found


def as_list(value: Any) -> list[Any]:
    """None as an empty list, a single value as a list of one."""
    if value is None:
        return []
    return list(value) if isinstance(value, list) else [value]
