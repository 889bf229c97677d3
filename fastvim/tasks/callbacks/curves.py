"""Learning curves of a run, as a picture."""

from __future__ import annotations

import csv
import logging
import math
from collections.abc import Sequence
from pathlib import Path

import lightning as L
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.trainer.states import TrainerFn
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fastvim.errors import UserError
from fastvim.pictures.colours import BLUE, GREEN, GREY, ORANGE
from fastvim.storage import save_figure

_logger = logging.getLogger(__name__)

Points = tuple[list[float], list[float]]


class LearningCurves(L.Callback):
    """Draws loss, accuracy and learning rate over the epochs when training ends or breaks off.

    The numbers come from the run's `metrics.csv`. A resumed run has one file per start; they are
    joined.

    Args:
        path: of the picture.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._resumed = True  # also if nothing is left to train

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._resumed = trainer.global_step > 0

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == TrainerFn.FITTING:
            self._draw(trainer)

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        if trainer.training:
            try:
                self._draw(trainer)
            except UserError as error:  # the exception matters more than its picture
                _logger.warning("%s", error)

    def _draw(self, trainer: L.Trainer) -> None:
        logger = next((log for log in trainer.loggers if isinstance(log, CSVLogger)), None)
        if logger is None or not trainer.is_global_zero:
            return
        logger.save()
        files = [Path(logger.log_dir) / "metrics.csv"]
        if self._resumed:
            starts = Path(logger.root_dir).glob("version_*/metrics.csv")
            files = sorted(starts, key=lambda file: int(file.parent.name.split("_")[1]))
        rows = join([_read(file) for file in files if file.exists()])
        batches = trainer.num_training_batches  # infinite if not known yet
        if rows and math.isfinite(batches):
            figure = draw_curves(rows, math.ceil(batches / trainer.accumulate_grad_batches))
            save_figure(self._path, figure, dpi=150)


def _read(file: Path) -> list[dict[str, float]]:
    """The rows of a `metrics.csv`, without the empty cells; damaged rows are left out and said."""
    rows, damaged = [], 0
    with file.open(newline="", encoding="utf-8", errors="replace") as lines:
        for row in csv.DictReader(line.replace("\0", "\ufffd") for line in lines):
            try:
                values = {name: float(value) for name, value in row.items() if value}
                values["step"]
            except (ValueError, TypeError, KeyError):
                damaged += 1
            else:
                rows.append(values)
    if damaged:
        _logger.warning("%s: %d damaged rows are left out of the curves", file, damaged)
    return rows


def join(starts: Sequence[list[dict[str, float]]]) -> list[dict[str, float]]:
    """The rows of all starts of a run; a later start replaces the steps that it did again."""
    joined: list[dict[str, float]] = []
    for rows in starts:
        if rows:
            first = min(row["step"] for row in rows)
            joined = [row for row in joined if row["step"] < first] + rows
    return joined


def draw_curves(rows: Sequence[dict[str, float]], steps_per_epoch: int) -> Figure:
    """Loss, accuracy and learning rate over epochs, from rows of Lightning's `metrics.csv`."""

    def points(name: str, scale: float = 1.0) -> Points:
        found = [(row["step"], row[name]) for row in rows if name in row]
        return [(step + 1) / steps_per_epoch for step, _ in found], [v * scale for _, v in found]

    accuracies = [
        (name, label, color)
        for name, label, color in (("val/acc1", "top-1", ORANGE), ("val/acc5", "top-5", GREEN))
        if any(name in row for row in rows)
    ]
    panels = 3 if accuracies else 2  # a masked autoencoder's run has none
    figure = Figure(figsize=(13 / 3 * panels, 3.8), layout="constrained")
    loss, *middle, rate = figure.subplots(1, panels)
    loss.plot(*points("train/loss"), color=BLUE, alpha=0.25, linewidth=1)
    loss.plot(*points("train/loss_epoch"), color=BLUE, label="training", linewidth=2)
    if any("val/loss" in row for row in rows):  # a detector's run has none
        loss.plot(*points("val/loss"), color=ORANGE, label="validation", linewidth=2)
    loss.set_title("Loss")
    loss.legend(frameon=False)

    for name, label, color in accuracies:
        epochs, values = points(name, scale=100)
        label = f"{label}, at the end {values[-1]:.1f}"
        middle[0].plot(epochs, values, color=color, label=label, linewidth=2)
    for axes in middle:
        axes.set_title("Validation accuracy (%)")
        axes.legend(frameon=False, loc="lower right")

    rate.plot(*points("train/lr"), color=GREY, linewidth=2)
    rate.set_title("Learning rate")
    rate.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    for axes in (loss, *middle, rate):
        _tidy(axes)
    return figure


def _tidy(axes: Axes) -> None:
    axes.set_xlabel("epoch")
    axes.set_xlim(left=0)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
