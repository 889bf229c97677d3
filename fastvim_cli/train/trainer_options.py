"""Ranges of the trainer's options, where Lightning has none or says them in many lines."""

from __future__ import annotations

import re

import lightning as L
from jsonargparse import Namespace
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher

from fastvim.errors import OptionError
from fastvim.options import COUNT, COUNT_OR_0, NOT_NEGATIVE, Range, check_given


def check_launcher(trainer: L.Trainer, strategy: object) -> None:
    """Refuse strategies whose processes begin as copies of this one, as `ddp_spawn`.

    Raises:
        OptionError: for such a strategy.
    """
    if isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
        expected = "ddp, whose processes start with the command: loggers and loaders are no copies"
        raise OptionError("strategy", strategy, expected)


def check_trainer(settings: Namespace) -> None:
    """Compare the options of a trainer with their ranges.

    Raises:
        OptionError: at the first one outside.
    """
    for name in ("max_epochs", "max_steps"):
        if settings[name] not in (None, -1) and settings[name] not in COUNT:
            raise OptionError(name, settings[name], f"{COUNT}, or -1 for no end")
    for name in ("limit_train_batches", "val_check_interval"):
        value = settings[name]
        batches = isinstance(value, int) and value in COUNT
        share = isinstance(value, float) and 0 < value <= 1
        if value is not None and not isinstance(value, str) and not (batches or share):
            raise OptionError(name, value, "a number of batches, or a share of them up to 1.0")
    for name in ("max_time", "val_check_interval"):
        value = settings[name]
        if isinstance(value, str) and not re.fullmatch(r"\d+(:\d+){3}", value):
            raise OptionError(name, value, "a time as DD:HH:MM:SS")
    names = ("accumulate_grad_batches", "check_val_every_n_epoch", "num_nodes")
    check_given(COUNT, **{name: settings[name] for name in names})
    names = ("min_epochs", "min_steps", "log_every_n_steps")
    check_given(COUNT_OR_0, **{name: settings[name] for name in names})
    check_given(NOT_NEGATIVE, gradient_clip_val=settings.gradient_clip_val)
    check_given(Range(-1, whole=True), num_sanity_val_steps=settings.num_sanity_val_steps)
