"""The trainer's options: ranges that Lightning has not, and its messages as a user writes them."""

from __future__ import annotations

import inspect
import os
import re
import typing
from collections.abc import Callable
from functools import reduce
from operator import or_

import lightning as L
from jsonargparse import Namespace
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher
from lightning.pytorch.strategies.strategy import Strategy

from fastvim.errors import OptionError, UserError
from fastvim.options import (
    COUNT,
    COUNT_OR_0,
    NODES,
    NOT_NEGATIVE,
    SHARE,
    WORKERS,
    Range,
    check,
    check_given,
)
from fastvim.tasks.strategies import SHARDED_PRECISIONS, ShardedStrategy

# What a command is about, which cannot be nothing.
LIMITS = {"fit": "train", "validate": "val", "test": "test"}
# Those that are no common words.
OPTIONS = [name for name in inspect.signature(L.Trainer).parameters if "_" in name]
STRATEGIES = "ddp (copies of the weights), or fsdp2 (weights divided among the processes)"


def read_integers_first(function: Callable[..., object]) -> None:
    """Have the parser try `int` before `float` in the options of a function.

    `typing` keeps one object for `Union[float, int]` and `Union[int, float]`: the one that some
    package asked for first. With floats first, 1 batch would be 1.0, all of them.
    """
    hints = inspect.unwrap(function).__annotations__
    for name, hint in hints.items():
        members = typing.get_args(hint)
        if typing.get_origin(hint) is typing.Union and {int, float} <= set(members):
            hints[name] = reduce(or_, sorted(members, key=lambda member: member is not int))


def check_strategy(trainer: L.Trainer, given: object) -> None:
    """Refuse strategies that train something else than one model.

    Raises:
        OptionError: processes that begin as copies of this one, as in `ddp_spawn`; another way to
            divide the weights or to keep them the same; a precision that `fsdp2` does not have.
    """
    strategy: Strategy = trainer.strategy
    if isinstance(strategy.launcher, _MultiProcessingLauncher):
        expected = "ddp, whose processes start with the command: loggers and loaders are no copies"
        raise OptionError("strategy", given, expected)
    if not isinstance(strategy, (SingleDeviceStrategy, DDPStrategy)):
        raise OptionError("strategy", type(strategy).__name__, STRATEGIES)
    if isinstance(strategy, ShardedStrategy) and trainer.precision not in SHARDED_PRECISIONS:
        expected = f"{', '.join(SHARDED_PRECISIONS)} with strategy fsdp2"
        raise OptionError("precision", trainer.precision, expected)


def trainer_mistake(error: Exception) -> UserError:
    """The user's mistake that an error of Lightning's trainer tells."""
    message = str(error)
    none = re.search(r"requested to check (\S+) of .* \* (\d+) < 1.*`(limit_\w+)`", message)
    if none:
        return OptionError(
            f"trainer.{none[3]}", float(none[1]), f"enough for one of {none[2]} batches"
        )
    return UserError(re.sub(rf"(?<![\w.])(?={'|'.join(OPTIONS)})", "trainer.", message))


def check_trainer(settings: Namespace, command: str) -> None:
    """Compare the options of a trainer with their ranges, and with each other.

    Args:
        settings: section `trainer` of the configuration.
        command: "fit", "validate" or "test".

    Raises:
        OptionError: at the first one outside.
    """
    if str(settings.strategy).startswith("fsdp") and settings.strategy != "fsdp2":
        raise OptionError("strategy", settings.strategy, STRATEGIES)
    if (root := settings.default_root_dir) and "://" in str(root):
        expected = "a folder: a run is written there, and copied to an address when it has ended"
        raise OptionError("default_root_dir", str(root), expected)
    for unit in ("epochs", "steps"):
        least, most = settings[f"min_{unit}"], settings[f"max_{unit}"]
        if most not in (None, -1) and (least or 0) > most:
            expected = f"{most} or less, as trainer.max_{unit} is {most}"
            raise OptionError(f"min_{unit}", least, expected)
    if not isinstance(settings.default_root_dir, str | os.PathLike | None):
        raise OptionError("default_root_dir", settings.default_root_dir, "a folder")
    for name in ("max_epochs", "max_steps"):
        if settings[name] not in (None, -1) and settings[name] not in COUNT:
            raise OptionError(name, settings[name], f"{COUNT}, or -1 for no end")
    some = (f"limit_{LIMITS[command]}_batches", "val_check_interval")
    limits = [f"limit_{data}_batches" for data in ("train", "val", "test", "predict")]
    for name in {*limits, "overfit_batches", "val_check_interval"}:
        value = settings[name]
        known = value in (COUNT_OR_0 if isinstance(value, int) else SHARE) and (
            value or name not in some
        )
        if value is not None and not isinstance(value, str) and not known:
            least = "" if name in some else "0, "
            expected = f"{least}a number of batches, or a share of them up to 1.0"
            raise OptionError(name, value, expected)
    for name in ("max_time", "val_check_interval"):
        value = settings[name]
        if isinstance(value, str) and not re.fullmatch(r"\d+(:\d+){3}", value):
            raise OptionError(name, value, "a time as DD:HH:MM:SS")
    if settings.max_time is not None and not re.search("[1-9]", str(settings.max_time)):
        raise OptionError("max_time", settings.max_time, "more than no time")
    names = ("accumulate_grad_batches", "check_val_every_n_epoch")
    check_given(COUNT, **{name: settings[name] for name in names})
    check(NODES, num_nodes=settings.num_nodes)
    if re.fullmatch(r"\d+", text := str(settings.devices)) and int(text[:9]) > WORKERS.high:
        raise OptionError("devices", settings.devices, f"{WORKERS.high} or less")
    others = ("min_epochs", "min_steps", "log_every_n_steps")
    check_given(COUNT_OR_0, **{name: settings[name] for name in others})
    check_given(NOT_NEGATIVE, gradient_clip_val=settings.gradient_clip_val)
    check_given(Range(-1, whole=True), num_sanity_val_steps=settings.num_sanity_val_steps)
